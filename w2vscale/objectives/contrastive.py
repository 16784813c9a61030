"""Wav2vec 2.0 pretraining (Baevski et al. 2020, arXiv:2006.11477).

For each masked frame, the model identifies its quantized features among those of other masked frames of the utterance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config import HealthConfig, ModelConfig, RegularizationConfig
from w2vscale.data.inputs import AudioBatch, Utterance
from w2vscale.data.randomness import Generators, Stream
from w2vscale.errors import UserError
from w2vscale.models.layers import Linear, dropout
from w2vscale.models.wav2vec2 import EncoderOutput, Wav2Vec2Encoder, valid_mask
from w2vscale.objectives.base import Finding, Objective, Panel, StepContext, TransformersHead
from w2vscale.objectives.details import Details, FramePredictions, attention_of_first, masked_details
from w2vscale.objectives.masking import masked_batch
from w2vscale.objectives.published import BASE_ACCURACY
from w2vscale.objectives.quantizer import Quantizer, code_ids, collapse, diversity_loss, perplexity
from w2vscale.objectives.settings import ContrastiveSettings
from w2vscale.objectives.similarity import (
    contrastive_logits,
    contrastive_loss,
    correct_predictions,
    negative_indices,
)

AT_CHANCE = 0.99  # a contrastive loss above this share of that of chance is not better than chance
SOLVED_ACCURACY, SOLVED_LOSS = 0.99, 0.05  # no model that learns speech gets there; the loss is in nats


class ContrastiveInputs(NamedTuple):
    """B utterances with M masked frames in total, listed utterance by utterance, and K negatives for each frame."""

    audio: AudioBatch
    masked_B: Tensor  # number of masked frames of each utterance
    frame_M: Tensor  # index of the frame in its utterance
    slot_M: Tensor  # index among the masked frames of its utterance
    negatives_MK: Tensor  # slots of the negatives, in the same utterance
    masked: tuple[int, ...]  # masked_B as Python numbers, so that reading them does not synchronise the GPU

    @property
    def weights(self) -> tuple[int, ...]:
        """Number of masked frames of each micro-batch."""
        return self.audio.per_micro_batch(self.masked)


class ContrastiveSums(NamedTuple):
    """Sums over masked frames. Divide them by the number of masked frames of the update, over all ranks."""

    total: Tensor  # contrastive + weighted diversity + weighted feature penalty, in nats
    contrastive: Tensor  # in nats
    diversity: Tensor  # diversity loss of each micro-batch times its masked frames
    feature_penalty: Tensor  # mean square of the features of each micro-batch times its masked frames
    correct: Tensor  # frames whose positive has the highest similarity
    masked: Tensor  # masked frames
    code_counts_GV: Tensor
    probability_sums_GV: Tensor


class Wav2Vec2ForPretraining(nn.Module):
    """The encoder and the quantizer, trained by masked contrastive prediction.

    Activations and matrix products are in `compute_dtype`; similarities, Gumbel softmax and losses are in fp32.
    """

    def __init__(
        self,
        model: ModelConfig,
        regularization: RegularizationConfig,
        settings: ContrastiveSettings,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.compute_dtype = compute_dtype
        channels = model.dim if settings.quantizer_input == "projected" else model.conv_layers[-1][0]
        self.encoder = Wav2Vec2Encoder(model, regularization)
        self.quantizer = Quantizer(
            channels, codebooks=settings.codebooks, entries=settings.codebook_entries, dim=settings.codevector_dim
        )
        self.context_projection = Linear(model.dim, settings.projection_dim)
        self.target_projection = (
            Linear(settings.codevector_dim, settings.projection_dim) if settings.target_projection else nn.Identity()
        )

    def forward(
        self,
        inputs: ContrastiveInputs,
        *,
        noise_MGV: Tensor | None = None,
        temperature: float = 1.0,
        active: Sequence[bool] | None = None,
        detailed: bool = False,
    ) -> ContrastiveSums | FramePredictions:
        """Compute the loss sums of the micro-batches in `inputs` or, if `detailed`, what each masked frame gets.

        Without Gumbel noise the quantizer takes the argmax. `active` says which transformer blocks to compute.
        """
        settings, audio = self.settings, inputs.audio
        encoded = self.encoder(audio.waveforms_BS.to(self.compute_dtype), audio.lengths, audio.mask_BT, active=active)
        utterance_M = torch.repeat_interleave(inputs.masked_B, output_size=inputs.frame_M.shape[0])
        targets_MC = self.quantizer_inputs(encoded)[utterance_M, inputs.frame_M]
        targets_MC = dropout(targets_MC, settings.feature_dropout, self.training)
        quantized = self.quantizer(targets_MC, noise_MGV, temperature)
        logits_MK = contrastive_logits(
            self.context_projection(encoded.context_BTD[utterance_M, inputs.frame_M]),
            self.target_projection(quantized.vectors_MD),
            code_ids(quantized.codes_MG, settings.codebook_entries),
            utterance_M=utterance_M,
            slot_M=inputs.slot_M,
            negatives_MK=inputs.negatives_MK,
            utterances=audio.waveforms_BS.shape[0],
            slots=max(inputs.masked),
            temperature=settings.logit_temperature,
        )
        if detailed:
            return FramePredictions(correct_predictions(logits_MK), quantized.codes_MG)
        contrastive, correct = contrastive_loss(logits_MK)
        probabilities_MGV = quantized.logits_MGV.softmax(dim=2)
        membership_KB = audio.membership()
        masked_K = membership_KB @ inputs.masked_B.float()
        sums_KGV = torch.einsum("km,mgv->kgv", membership_KB[:, utterance_M], probabilities_MGV)
        diversity = diversity_loss(sums_KGV / masked_K.clamp(min=1.0)[:, None, None]) @ masked_K
        penalty = _mean_squares(encoded.features_BTC, audio, membership_KB) @ masked_K
        total = contrastive + settings.diversity_weight * diversity + settings.feature_penalty_weight * penalty
        codes_GVM = F.one_hot(quantized.codes_MG, settings.codebook_entries)
        return ContrastiveSums(
            total=total,
            contrastive=contrastive.detach(),
            diversity=diversity.detach(),
            feature_penalty=penalty.detach(),
            correct=correct.float(),
            masked=torch.full_like(contrastive.detach(), float(sum(inputs.masked))),
            code_counts_GV=codes_GVM.sum(dim=0).float(),
            probability_sums_GV=sums_KGV.detach().sum(dim=0),
        )

    def quantizer_inputs(self, encoded: EncoderOutput) -> Tensor:
        """Return the unmasked features that the quantizer takes as input, [B, T, C]."""
        return encoded.projected_BTD if self.settings.quantizer_input == "projected" else encoded.normalised_BTC


class Contrastive(Objective):
    """The objective of wav2vec 2.0 pretraining."""

    Settings = ContrastiveSettings
    settings: ContrastiveSettings

    @property
    def code_entries(self) -> int:  # type: ignore[override]
        return self.settings.codebook_entries

    def build_model(self) -> Wav2Vec2ForPretraining:
        return Wav2Vec2ForPretraining(self.model, self.regularization, self.settings, self.compute_dtype)

    def make_inputs(self, utterances: Sequence[Utterance], *, rng: Generators, width: int = 0) -> ContrastiveInputs:
        audio, generators = masked_batch(utterances, self.model, self.settings, rng=rng, width=width)
        masks_BT = audio.mask_BT.numpy()
        masked_B = masks_BT.sum(axis=1)
        utterance_M, frame_M = masks_BT.nonzero()
        slot_M = np.arange(utterance_M.size) - (np.cumsum(masked_B) - masked_B)[utterance_M]
        negatives: list[NDArray[np.integer]] = [np.zeros((0, self.settings.negatives), dtype=np.int16)]
        for masked, draws in zip(masked_B.tolist(), generators, strict=False):
            negatives.append(negative_indices(masked, self.settings.negatives, draws))
        return ContrastiveInputs(
            audio=audio,
            masked_B=torch.from_numpy(masked_B),
            frame_M=torch.from_numpy(frame_M),
            slot_M=torch.from_numpy(slot_M),
            negatives_MK=torch.from_numpy(np.concatenate(negatives)),
            masked=tuple(masked_B.tolist()),
        )

    def draws(self, inputs: ContrastiveInputs, step: StepContext) -> dict[str, Any]:
        return {"noise_MGV": self._gumbel_noise(inputs, step), "temperature": self.settings.temperature(step.update)}

    def _gumbel_noise(self, inputs: ContrastiveInputs, step: StepContext) -> Tensor:
        """Standard Gumbel noise [M, G, V] fp32; each micro-batch has its own generator."""
        device = inputs.frame_M.device
        shape = (self.settings.codebooks, self.settings.codebook_entries)
        noise = [
            -torch.empty(weight, *shape, device=device).exponential_(generator=draws).log()
            for weight, draws in zip(inputs.weights, step.generators(Stream.GUMBEL, device), strict=True)
        ]
        return torch.cat(noise)

    def inspect(self, module: nn.Module, inputs: ContrastiveInputs, *, samples: int, blocks: Sequence[int]) -> Details:
        with attention_of_first(module, inputs.audio, blocks) as attention:
            predictions: FramePredictions = module(inputs, detailed=True)
        entries = self.settings.codebook_entries
        return masked_details(inputs, predictions, entries=entries, samples=samples, attention=attention)

    def metrics(self, sums: ContrastiveSums) -> dict[str, float]:
        """Compute metrics per masked frame; NaN if there is none.

        Losses are in nats, `*_bits` in bits. `code_perplexity_g` is the effective number of entries of codebook g in
        use, computed from the selected codes; `probability_perplexity_g` is computed from the mean softmax.
        """
        frames = float(sums.masked) or math.nan
        loss, contrastive = float(sums.total) / frames, float(sums.contrastive) / frames
        values = {
            "loss": loss,
            "contrastive": contrastive,
            "diversity": float(sums.diversity) / frames,
            "feature_penalty": float(sums.feature_penalty) / frames,
            "accuracy": float(sums.correct) / frames,
            "masked_frames": float(sums.masked),
            "loss_bits": loss / math.log(2),
            "contrastive_bits": contrastive / math.log(2),
        }
        code_perplexity_G = perplexity(sums.code_counts_GV.double() / frames)
        probability_perplexity_G = perplexity(sums.probability_sums_GV.double() / frames)
        used_G = (sums.code_counts_GV > 0).sum(dim=1)
        for codebook in range(self.settings.codebooks):
            values[f"code_perplexity_{codebook}"] = float(code_perplexity_G[codebook])
            values[f"probability_perplexity_{codebook}"] = float(probability_perplexity_G[codebook])
            values[f"used_entries_{codebook}"] = int(used_G[codebook])
        return values

    def scheduled(self, update: int) -> dict[str, float]:
        return {"temperature": self.settings.temperature(update)}

    def line(self, metrics: Mapping[str, float]) -> str:
        books = range(self.settings.codebooks)
        used = "/".join(f"{metrics[f'used_entries_{book}']:.0f}" for book in books)
        perplexity = "/".join(f"{metrics[f'code_perplexity_{book}']:.0f}" for book in books)
        chance = 1.0 / (1 + self.settings.negatives)
        return (
            f"loss {metrics['loss']:.3f} nats  accuracy {metrics['accuracy']:.3f} (chance {chance:.3f})"
            f"  codes used {used} of {self.settings.codebook_entries} (perplexity {perplexity})"
        )

    def table(self, metrics: Mapping[str, float]) -> dict[str, str]:
        return {
            "contrastive loss": f"{metrics['contrastive']:.4f} nats = {metrics['contrastive_bits']:.4f} bits",
            "contrastive accuracy": f"{metrics['accuracy']:.4f}",
            "diversity loss": f"{metrics['diversity']:.4f}",
            "masked frames": f"{int(metrics['masked_frames']):,}",
            **{
                f"codebook {one}": f"{int(metrics[f'used_entries_{one}'])} of {self.settings.codebook_entries} "
                f"entries used, code perplexity {metrics[f'code_perplexity_{one}']:.1f}"
                for one in range(self.settings.codebooks)
            },
        }

    def findings(self, metrics: Mapping[str, float], limits: HealthConfig) -> list[Finding]:
        settings, accuracy, loss = self.settings, metrics["accuracy"], metrics["contrastive"]
        found = collapse(
            metrics, codebooks=settings.codebooks, entries=settings.codebook_entries, share=limits.min_codes,
            advice="raise objective.diversity_weight, lower optim.lr, or lengthen schedule.warmup_updates",
        )  # fmt: skip
        chance_loss = math.log(1 + settings.negatives)
        # The accuracy says less: it is above 1 / (1 + negatives) where negatives with the codes of the positive are
        # excluded, and 1 where all similarities are equal.
        if loss > AT_CHANCE * chance_loss:
            found.append(
                Finding(
                    "chance",
                    f"predictions are no better than chance: contrastive loss {loss:.3f} nats, above {AT_CHANCE:g} "
                    f"times that of chance ({chance_loss:.3f}), accuracy {accuracy:.4f}; use more audio per update "
                    "(batch.micro_batches), a longer schedule.warmup_updates, or another optim.lr",
                )
            )
        if accuracy > SOLVED_ACCURACY and loss < SOLVED_LOSS:
            found.append(
                Finding(
                    "solved",
                    f"the contrastive task is solved: accuracy {accuracy:.4f} (above {SOLVED_ACCURACY:g}), "
                    f"contrastive loss {loss:.4f} nats (below {SOLVED_LOSS:g}); features have collapsed, and the model "
                    "is not learning speech: lower optim.lr, or lengthen schedule.warmup_updates",
                )
            )
        return found

    def panels(self) -> tuple[Panel, Panel, Panel]:
        chance = 1.0 / (1 + self.settings.negatives)
        codes = {f"code_perplexity_{one}": f"codebook {one}" for one in range(self.settings.codebooks)}
        return (
            Panel("bits", "contrastive loss (bits)", {"contrastive_bits": ""}, chance=-math.log2(chance)),
            Panel("accuracy", "contrastive accuracy", {"accuracy": ""}, chance=chance, published=BASE_ACCURACY),
            Panel("codes", f"code perplexity (of {self.settings.codebook_entries})", codes),
        )

    def codes(self, module: nn.Module, encoded: EncoderOutput) -> Tensor:
        """Return the entries that the quantizer selects."""
        model: Any = module
        inputs_BTC = model.quantizer_inputs(encoded)
        codes_MG: Tensor = model.quantizer(inputs_BTC.flatten(0, 1), None, 1.0).codes_MG
        return codes_MG.unflatten(0, inputs_BTC.shape[:2])

    def transformers_head(self) -> TransformersHead:
        """Return the Transformers names for the heads. Raises UserError if Transformers has no such quantizer."""
        settings = self.settings
        obstacles = {
            "objective.quantizer_input=projected": settings.quantizer_input == "projected",
            "objective.target_projection=false": not settings.target_projection,
        }
        if present := [setting for setting, found in obstacles.items() if found]:
            raise UserError(
                f"{present[0]}: Hugging Face Transformers has no such wav2vec 2.0; "
                "only models of the published architectures can be converted"
            )
        return TransformersHead(
            architecture="Wav2Vec2ForPreTraining",
            summary="A speech model pretrained on audio without transcripts, by contrastive prediction of masked "
            "speech ([Baevski et al. 2020](https://arxiv.org/abs/2006.11477)). It has no output layer for text: "
            "fine-tune it, or use its hidden states.",
            tensors={
                "quantizer.codevectors": "quantizer.codevectors",
                "quantizer.projection": "quantizer.weight_proj",
                "context_projection": "project_hid",
                "target_projection": "project_q",
            },
            settings={theirs: getattr(settings, ours) for theirs, (ours, _) in TRANSFORMERS_SETTINGS.items()}
            | {
                "mask_time_prob": settings.mask_probability,
                "mask_time_length": settings.mask_length,
                "mask_time_min_masks": settings.mask_min_spans,
                "mask_feature_prob": 0.0,
            },
        )


TRANSFORMERS_SETTINGS: dict[str, tuple[str, Any]] = {
    "num_codevector_groups": ("codebooks", 2),
    "num_codevectors_per_group": ("codebook_entries", 320),
    "codevector_dim": ("codevector_dim", 256),
    "proj_codevector_dim": ("projection_dim", 256),
    "feat_quantizer_dropout": ("feature_dropout", 0.0),
    "num_negatives": ("negatives", 100),
    "contrastive_logits_temperature": ("logit_temperature", 0.1),
    "diversity_loss_weight": ("diversity_weight", 0.1),
}
"""Transformers name: our name, and the default that applies if config.json lacks it (5.23, `Wav2Vec2Config`)."""


def _mean_squares(features_BTC: Tensor, audio: AudioBatch, membership_KB: Tensor) -> Tensor:
    """Mean square of the features (before LayerNorm) of each micro-batch, [K]."""
    square_BT = features_BTC.float().square().mean(dim=2)
    if audio.padded:
        square_BT = square_BT * valid_mask(audio.frames_B, square_BT.shape[1])
    return (membership_KB @ square_BT.sum(dim=1)) / (membership_KB @ audio.frames_B.float())
