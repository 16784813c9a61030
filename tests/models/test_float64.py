"""Forward, loss and gradients of pretraining against a second derivation in float64, written from the formulas.

The derivation below shares no code with the model: one utterance at a time and never padded, with loops over heads,
groups, codebooks, frames and negatives (Baevski et al. 2020; where the paper is silent, fairseq's wav2vec2.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.batches import inputs_of, utterance_of_masked_frames
from w2vscale.config import ModelConfig, load_config
from w2vscale.data.inputs import join
from w2vscale.objectives import build_objective
from w2vscale.objectives.contrastive import Contrastive, ContrastiveInputs, ContrastiveSettings, ContrastiveSums

Weights = Mapping[str, Tensor]

TINY = (
    "model.conv_layers=[[12,10,5],[12,3,2],[16,2,2]]",
    "model.conv_norm_groups=12",
    "model.layers=2",
    "model.dim=24",
    "model.ffn_dim=32",
    "model.heads=3",
    "model.positional_kernel=8",
    "model.positional_groups=4",
    "regularization.dropout=0",
    "regularization.attention_dropout=0",
    "regularization.input_dropout=0",
    "objective.feature_dropout=0",
    "objective.codebook_entries=5",
    "objective.codevector_dim=12",
    "objective.projection_dim=12",
    "objective.mask_length=3",
    "objective.negatives=7",
    "regularization.feature_grad_mult=0.3",
    "objective.feature_penalty_weight=2.0",
    "objective.diversity_weight=0.7",
)
STYLES = {
    "base": ("base", TINY),
    "large_lv60": ("large_lv60", (*TINY, "model.positional_kernel=7", "objective.codebooks=3")),
    "base_prenorm": ("base_prenorm", (*TINY, "model.conv_norm_groups=4")),
}
TEMPERATURE = 1.7
# Samples of each utterance; the last but one has one frame, which is not masked with this seed.
MICRO_BATCHES = ((700, 1010, 893), (820, 30, 640))


# ---------------------------------------------------------------- the second derivation


def derive(
    weights: Weights, objective: Contrastive, parts: Sequence[ContrastiveInputs], noise_MGV: Tensor
) -> dict[str, Tensor]:
    """Loss sums of micro-batches, in float64."""
    settings = objective.settings
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("contrastive", "diversity", "feature_penalty")}
    counts_GV = torch.zeros(settings.codebooks, settings.codebook_entries, dtype=torch.float64)
    probability_sums_GV = torch.zeros_like(counts_GV)
    correct = excluded = 0
    for part in parts:
        noise_of_part, noise_MGV = noise_MGV[: sum(part.masked)], noise_MGV[sum(part.masked) :]
        probabilities: list[Tensor] = []
        squares: list[Tensor] = []
        for row, samples in enumerate(part.audio.lengths_B.tolist()):
            mask_T = part.audio.mask_BT[row, : int(part.audio.frames_B[row])]
            waveform_S = part.audio.waveforms_BS[row, :samples]
            features_TC, context_TD, targets_TC = encode(weights, objective, waveform_S, mask_T)
            squares.append((features_TC**2).reshape(-1))
            masked = mask_T.nonzero().squeeze(1).tolist()
            start = len(probabilities)
            codes, vectors = [], []
            for number, frame in enumerate(masked):
                noise_GV = noise_of_part[start + number]
                vector_D, chosen, soft_GV = quantize(weights, settings, targets_TC[frame], noise_GV)
                vectors.append(project_target(weights, settings, vector_D))
                codes.append(chosen)
                probabilities.append(soft_GV)
                for group, code in enumerate(chosen):
                    counts_GV[group, code] += 1
            negatives_NK = part.negatives_MK[utterance_of_masked_frames(part) == row].tolist()
            for number, frame in enumerate(masked):
                context_D = affine(context_TD[frame], weights, "context_projection")
                candidates = [vectors[number]]
                candidates += [vectors[other] for other in negatives_NK[number] if codes[other] != codes[number]]
                excluded += 1 + len(negatives_NK[number]) - len(candidates)
                similarity = torch.stack([cosine(context_D, vector_D) for vector_D in candidates])
                logits = similarity / settings.logit_temperature
                sums["contrastive"] = sums["contrastive"] + torch.log(torch.exp(logits).sum()) - logits[0]
                correct += bool((logits[1:] <= logits[0]).all())
        probability_sums_GV += torch.stack(probabilities).detach().sum(dim=0)
        mean_GV = torch.stack(probabilities).mean(dim=0)
        sums["diversity"] = sums["diversity"] + diversity(mean_GV) * len(probabilities)
        sums["feature_penalty"] = sums["feature_penalty"] + torch.cat(squares).mean() * len(probabilities)
    total = (
        sums["contrastive"]
        + settings.diversity_weight * sums["diversity"]
        + settings.feature_penalty_weight * sums["feature_penalty"]
    )
    counts = {"correct": torch.tensor(correct), "excluded": torch.tensor(excluded)}
    return {**sums, **counts, "total": total, "code_counts_GV": counts_GV, "probability_sums_GV": probability_sums_GV}


def encode(
    weights: Weights, objective: Contrastive, waveform_S: Tensor, mask_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(features before their LayerNorm, context, input of the quantizer) of one utterance, each [T, ·]."""
    config = objective.model
    x_CT = waveform_S.double().unsqueeze(0)
    for index, (_, kernel, stride) in enumerate(config.conv_layers):
        name = f"encoder.feature_encoder.layers.{index}"
        padding = (kernel - 1) // 2 if config.conv_padding else 0
        x_CT = convolve(x_CT, weights[f"{name}.weight"], stride=stride, left=padding, right=padding)
        if config.conv_bias:
            x_CT = x_CT + weights[f"{name}.bias"][:, None]
        if config.conv_norm == "layer":
            x_CT = layer_norm(x_CT.T, weights, f"{name}.norm").T
        elif index == 0:
            x_CT = group_norm(x_CT, weights, f"{name}.norm", config.conv_norm_groups)
        x_CT = gelu(x_CT)
    # Only the gradient into the convolutions is scaled, including the gradient of the penalty.
    scale = objective.regularization.feature_grad_mult
    features_TC = scale * x_CT.T + (1 - scale) * x_CT.T.detach()
    normalised_TC = layer_norm(features_TC, weights, "encoder.feature_norm")
    projected_TD = affine(normalised_TC, weights, "encoder.feature_projection")
    x_TD = torch.stack(
        [weights["encoder.mask_embedding"] if mask_T[frame] else projected_TD[frame] for frame in range(len(mask_T))]
    )
    x_TD = x_TD + positions(weights, config, x_TD)
    if config.embedding_norm:
        x_TD = layer_norm(x_TD, weights, "encoder.transformer.embedding_norm")
    for index in range(config.layers):
        name = f"encoder.transformer.blocks.{index}"
        if config.norm_first:
            x_TD = x_TD + attention(layer_norm(x_TD, weights, f"{name}.attention_norm"), weights, name, config.heads)
            x_TD = x_TD + feed_forward(layer_norm(x_TD, weights, f"{name}.feed_forward_norm"), weights, name)
        else:
            x_TD = layer_norm(x_TD + attention(x_TD, weights, name, config.heads), weights, f"{name}.attention_norm")
            x_TD = layer_norm(x_TD + feed_forward(x_TD, weights, name), weights, f"{name}.feed_forward_norm")
    if config.norm_first:
        x_TD = layer_norm(x_TD, weights, "encoder.transformer.final_norm")
    return features_TC, x_TD, projected_TD if objective.settings.quantizer_input == "projected" else normalised_TC


def convolve(x_CT: Tensor, weight_OCK: Tensor, *, stride: int, left: int, right: int) -> Tensor:
    channels = x_CT.shape[0]
    padded = torch.cat([x_CT.new_zeros(channels, left), x_CT, x_CT.new_zeros(channels, right)], dim=1)
    windows_CTK = padded.unfold(1, weight_OCK.shape[2], stride)
    return torch.einsum("ctk,ock->ot", windows_CTK, weight_OCK)


def positions(weights: Weights, config: ModelConfig, x_TD: Tensor) -> Tensor:
    """Grouped convolution, whose weight of each kernel step has the length `magnitude` (weight norm)."""
    name = "encoder.transformer.positional"
    direction, magnitude = weights[f"{name}.direction"], weights[f"{name}.magnitude"]
    kernel, size = config.positional_kernel, config.dim // config.positional_groups
    lengths_K = torch.stack([torch.sqrt((direction[:, :, step] ** 2).sum()) for step in range(kernel)])
    weight_OIK = direction / lengths_K * magnitude.reshape(-1)
    groups = []
    for group in range(config.positional_groups):
        rows = slice(group * size, (group + 1) * size)
        # kernel // 2 zeros on both sides; an even kernel gives one frame too many, which is dropped at the end.
        right = kernel // 2 - (kernel + 1) % 2
        groups.append(convolve(x_TD[:, rows].T, weight_OIK[rows], stride=1, left=kernel // 2, right=right))
    return gelu(torch.cat(groups).T + weights[f"{name}.bias"])


def attention(x_TD: Tensor, weights: Weights, block: str, heads: int) -> Tensor:
    dim = x_TD.shape[1]
    weight, bias = weights[f"{block}.attention.qkv.weight"], weights[f"{block}.attention.qkv.bias"]
    q, k, v = (x_TD @ weight[i * dim : (i + 1) * dim].T + bias[i * dim : (i + 1) * dim] for i in range(3))
    size = dim // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores_TT = q[:, part] @ k[:, part].T / math.sqrt(size)
        outputs.append(softmax(scores_TT) @ v[:, part])
    return affine(torch.cat(outputs, dim=1), weights, f"{block}.attention.out")


def feed_forward(x_TD: Tensor, weights: Weights, block: str) -> Tensor:
    hidden = gelu(affine(x_TD, weights, f"{block}.feed_forward.intermediate"))
    return affine(hidden, weights, f"{block}.feed_forward.output")


def quantize(
    weights: Weights, settings: ContrastiveSettings, x_C: Tensor, noise_GV: Tensor
) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """(vector, codes, softmax of the raw logits) of one frame: Gumbel softmax, hard, straight through."""
    logits_GV = affine(x_C, weights, "quantizer.projection").reshape(settings.codebooks, -1)
    vectors, codes = [], []
    for group in range(settings.codebooks):
        soft_V = softmax((logits_GV[group] + noise_GV[group]) / TEMPERATURE)
        code = int(soft_V.argmax())
        hard_V = torch.zeros_like(soft_V)
        hard_V[code] = 1.0
        vectors.append((hard_V + soft_V - soft_V.detach()) @ weights["quantizer.codevectors"][group])
        codes.append(code)
    return torch.cat(vectors), tuple(codes), softmax(logits_GV)


def project_target(weights: Weights, settings: ContrastiveSettings, vector_D: Tensor) -> Tensor:
    return affine(vector_D, weights, "target_projection") if settings.target_projection else vector_D


def diversity(mean_GV: Tensor) -> Tensor:
    """(G V − Σ_g exp H(p̄_g)) / (G V), with fairseq's 1e-7 inside the logarithm."""
    perplexities = [torch.exp(-sum(p * torch.log(p + 1e-7) for p in mean_V)) for mean_V in mean_GV]
    return (mean_GV.numel() - sum(perplexities)) / mean_GV.numel()


def affine(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x_TC: Tensor, weights: Weights, name: str) -> Tensor:
    mean = x_TC.mean(dim=1, keepdim=True)
    variance = ((x_TC - mean) ** 2).mean(dim=1, keepdim=True)
    return (x_TC - mean) / torch.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def group_norm(x_CT: Tensor, weights: Weights, name: str, groups: int) -> Tensor:
    normalised = []
    for part in x_CT.reshape(groups, -1):
        variance = ((part - part.mean()) ** 2).mean()
        normalised.append((part - part.mean()) / torch.sqrt(variance + 1e-5))
    x_CT = torch.stack(normalised).reshape(x_CT.shape)
    return x_CT * weights[f"{name}.weight"][:, None] + weights[f"{name}.bias"][:, None]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def softmax(x: Tensor) -> Tensor:
    powers = torch.exp(x - x.detach().max(dim=-1, keepdim=True).values)
    return powers / powers.sum(dim=-1, keepdim=True)


def cosine(a_D: Tensor, b_D: Tensor) -> Tensor:
    return (a_D @ b_D) / torch.sqrt((a_D @ a_D) * (b_D @ b_D))


# ---------------------------------------------------------------- the comparison


class Case:
    """A tiny random model, two padded micro-batches and Gumbel noise."""

    def __init__(self, style: str) -> None:
        preset, overrides = STYLES[style]
        objective = build_objective(load_config(preset, overrides))
        assert isinstance(objective, Contrastive)
        self.objective = objective
        torch.manual_seed(11)
        self.model = objective.build_model().train()
        with torch.no_grad():
            for parameter in self.model.parameters():  # away from zero biases, unit scales and near-zero matrices
                parameter.add_(0.2 * torch.randn_like(parameter))
        draws = np.random.default_rng(5)
        self.parts = [
            inputs_of(
                objective,
                [draws.standard_normal(size, dtype=np.float32) for size in sizes],
                number=number,
                seed=2,
            )
            for number, sizes in enumerate(MICRO_BATCHES)
        ]
        masked = sum(sum(part.masked) for part in self.parts)
        shape = (masked, objective.settings.codebooks, objective.settings.codebook_entries)
        self.noise_MGV = -torch.empty(shape).exponential_().log()
        self.weights = {
            name: parameter.detach().double().requires_grad_() for name, parameter in self.model.named_parameters()
        }
        self.expected = derive(self.weights, objective, self.parts, self.noise_MGV.double())
        self.expected["total"].backward()

    def run(self, dtype: torch.dtype) -> tuple[ContrastiveSums, dict[str, Tensor | None]]:
        """Loss sums and gradients of the model itself."""
        model = copy.deepcopy(self.model).to(dtype)
        model.compute_dtype = dtype
        sums = model(join(self.parts), noise_MGV=self.noise_MGV.to(dtype), temperature=TEMPERATURE)
        sums.total.backward()
        return sums, {name: parameter.grad for name, parameter in model.named_parameters()}

    def assert_sums(self, sums: ContrastiveSums, tolerance: float) -> None:
        assert torch.equal(sums.code_counts_GV.double(), self.expected["code_counts_GV"])
        torch.testing.assert_close(
            sums.probability_sums_GV.double(), self.expected["probability_sums_GV"], rtol=10 * tolerance, atol=tolerance
        )
        assert int(sums.correct) == int(self.expected["correct"])
        assert int(sums.masked) == sum(sum(part.masked) for part in self.parts)
        for name in ("contrastive", "diversity", "feature_penalty", "total"):
            expected = float(self.expected[name].detach())
            assert float(getattr(sums, name).detach()) == pytest.approx(expected, rel=tolerance), name

    def assert_gradients(self, gradients: Mapping[str, Tensor | None], tolerance: float) -> None:
        assert gradients.keys() == self.weights.keys()
        for name, gradient in gradients.items():
            expected = self.weights[name].grad
            assert gradient is not None and expected is not None, name
            error = float((gradient.double() - expected).norm() / expected.norm())
            assert error < tolerance, (name, error)


@pytest.fixture(scope="module", params=STYLES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_fp32_equals_the_derivation(case: Case) -> None:
    sums, gradients = case.run(torch.float32)
    case.assert_sums(sums, tolerance=1e-5)
    case.assert_gradients(gradients, tolerance=1e-4)


def test_float64_equals_the_derivation(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fp32 parts of the model in float64, the two agree to 1e-9, so they differ only by rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    sums, gradients = case.run(torch.float64)
    case.assert_sums(sums, tolerance=1e-9)
    case.assert_gradients(gradients, tolerance=1e-9)


def test_the_cases_hold_what_they_should_test(case: Case) -> None:
    """Padding, an utterance without masked frames, excluded negatives, several codes, settings of each style."""
    together = join(case.parts)
    assert together.audio.padded
    assert len(set(together.audio.frames_B.tolist())) == 6
    assert int(together.audio.mask_BT[4].sum()) == 0
    assert 0 < int(case.expected["excluded"]) < together.negatives_MK.numel() / 2
    assert int((case.expected["code_counts_GV"] > 0).sum()) > 2 * case.objective.settings.codebooks
    model, settings = case.objective.model, case.objective.settings
    encoder = (model.norm_first, model.conv_norm, model.conv_padding)
    assert (*encoder, settings.quantizer_input, settings.target_projection) in (
        (False, "group", False, "features", True),
        (True, "layer", False, "features", True),
        (True, "group", True, "projected", False),
    )
