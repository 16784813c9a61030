"""The model against Hugging Face Transformers, with the same weights, masks and negatives."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers.batches import inputs_of
from tests.helpers.continued import flat_negatives
from tests.helpers.converted import from_huggingface, to_huggingface
from tests.helpers.families import noise, valid_frames
from tests.helpers.micro import SMALL
from w2vscale.config import Config, load_config, preset_names
from w2vscale.errors import UserError
from w2vscale.interop.huggingface import huggingface_config
from w2vscale.objectives import build_objective
from w2vscale.objectives.contrastive import ContrastiveInputs, ContrastiveSums, Wav2Vec2ForPretraining

transformers = pytest.importorskip("transformers")

CONVERTIBLE = [
    name
    for name in preset_names()
    if not name.startswith(("base_prenorm", "fairseq")) and load_config(name).objective.name == "wav2vec2"
]
OTHER = (
    "model.conv_layers=[[24,8,4],[36,3,2],[30,4,3],[20,2,2]]",
    "model.conv_norm_groups=24",
    "model.layers=2",
    "model.dim=60",
    "model.ffn_dim=70",
    "model.heads=5",
    "model.positional_kernel=9",
    "model.positional_groups=6",
    "objective.codebooks=3",
    "objective.codevector_dim=33",
    "objective.projection_dim=17",
    "objective.mask_length=4",
    "objective.logit_temperature=0.2",
)
# name: (preset, overrides, samples of each utterance)
MODELS = {
    "base": ("base", SMALL, (5000, 5000, 5000)),
    "base with other dimensions": ("base", (*SMALL, *OTHER), (5000, 5000)),
    "base at full size": ("base", (), (20_000, 20_000)),
    "large_lv60": ("large_lv60", SMALL, (5000, 5000, 5000)),
    "omni_3b and omni_7b at full width": ("omni_7b", ("model.layers=2",), (20_000, 17_000)),
    "large_lv60, padded": ("large_lv60", SMALL, (3100, 5000, 4444)),
    "large_lv60 with other dimensions, padded": ("large_lv60", (*SMALL, *OTHER), (5000, 3777)),
}


class Pair(NamedTuple):
    """Outputs of our model and of the Transformers model for one batch."""

    config: Config
    inputs: ContrastiveInputs
    ours: ContrastiveSums
    hidden: list[Tensor]  # each [B, T, D], like the outputs of Transformers below
    context_BTD: Tensor
    projected_MD: Tensor
    vectors_MD: Tensor
    projected_vectors_MD: Tensor
    theirs: Any
    their_vectors_BTD: Tensor
    their_context_BTD: Tensor


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def pair(request: pytest.FixtureRequest) -> Pair:
    preset, overrides, samples = request.param
    config = load_config(preset, [*overrides, "precision.compute=fp32"])
    torch.manual_seed(8)  # with these weights, no two codes are so close that rounding could decide
    model = model_of(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no zero biases or unit scales, so that a mix-up shows
                parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = inputs_of(build_objective(config), noise(*samples, seed=3), seed=1)
    with torch.device("meta"):
        other = transformers_model(config)
    other.load_state_dict(to_huggingface(model.state_dict(), config), assign=True)
    return run_both(config, model, other.eval(), inputs)


def test_omni_3b_and_omni_7b_differ_in_their_number_of_layers_only() -> None:
    """So one comparison at full width is for both."""
    small, large = (load_config(name, ["model.layers=2"]) for name in ("omni_3b", "omni_7b"))
    assert small.model == large.model and small.objective == large.objective


def model_of(config: Config) -> Wav2Vec2ForPretraining:
    model = build_objective(config).build_model()
    assert isinstance(model, Wav2Vec2ForPretraining)
    return model


def transformers_model(config: Config) -> Any:
    return transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**huggingface_config(config)))


@torch.no_grad()
def run_both(config: Config, model: Wav2Vec2ForPretraining, other: Any, inputs: ContrastiveInputs) -> Pair:
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.update({name: output})

    model.encoder.register_forward_hook(keep("encoded"))
    model.quantizer.register_forward_hook(keep("quantized"))
    model.context_projection.register_forward_hook(keep("projected"))
    model.target_projection.register_forward_hook(keep("projected_vectors"))
    other.quantizer.register_forward_hook(keep("their_quantized"))
    other.wav2vec2.register_forward_hook(keep("their_encoded"))
    ours = model(inputs)
    audio = inputs.audio
    attention_mask_BS = torch.arange(audio.waveforms_BS.shape[1]) < audio.lengths_B.unsqueeze(1)
    theirs = other(
        audio.waveforms_BS,
        attention_mask=attention_mask_BS.long() if audio.padded else None,
        mask_time_indices=audio.mask_BT,
        sampled_negative_indices=flat_negatives(inputs),
        output_hidden_states=True,
    )
    return Pair(
        config=config,
        inputs=inputs,
        ours=ours,
        hidden=seen["encoded"].hidden,
        context_BTD=seen["encoded"].context_BTD,
        projected_MD=seen["projected"],
        vectors_MD=seen["quantized"].vectors_MD,
        projected_vectors_MD=seen["projected_vectors"],
        theirs=theirs,
        their_vectors_BTD=seen["their_quantized"][0],
        their_context_BTD=seen["their_encoded"].last_hidden_state,
    )


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value."""
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def test_every_hidden_state_is_equal(pair: Pair) -> None:
    valid_BT = valid_frames(pair.inputs)
    assert len(pair.hidden) == pair.config.model.layers + 1
    for ours, theirs in zip(pair.hidden, pair.theirs.hidden_states, strict=True):
        assert_equal(ours[valid_BT], theirs[valid_BT])
    assert_equal(pair.context_BTD[valid_BT], pair.their_context_BTD[valid_BT])


def test_projected_states_are_equal(pair: Pair) -> None:
    assert_equal(pair.projected_MD, pair.theirs.projected_states[pair.inputs.audio.mask_BT])


def test_quantized_vectors_are_equal(pair: Pair) -> None:
    assert_equal(pair.vectors_MD, pair.their_vectors_BTD[pair.inputs.audio.mask_BT])
    assert_equal(pair.projected_vectors_MD, pair.theirs.projected_quantized_states[pair.inputs.audio.mask_BT])


def test_the_contrastive_loss_is_equal(pair: Pair) -> None:
    assert pair.inputs.masked[0] > 20
    assert pair.ours.contrastive > 0
    assert_equal(pair.ours.contrastive, pair.theirs.contrastive_loss)


def test_the_perplexity_of_the_codes_is_equal(pair: Pair) -> None:
    usage_GV = pair.ours.code_counts_GV / pair.ours.masked
    entropy_G = -torch.xlogy(usage_GV, usage_GV).sum(dim=1)
    assert_equal(entropy_G.exp().sum(), pair.theirs.codevector_perplexity)


def test_attention_masks_of_a_padded_batch_are_equal() -> None:
    """Both compute the same number of valid frames for any length."""
    config = load_config("large_lv60", SMALL)
    with torch.device("meta"):
        other = transformers_model(config)
    audio = inputs_of(build_objective(config), noise(*range(1500, 1580, 3))).audio
    assert torch.equal(other._get_feat_extract_output_lengths(audio.lengths_B), audio.frames_B)


@pytest.mark.parametrize("preset", CONVERTIBLE)
def test_a_preset_has_as_many_parameters_as_theirs(preset: str) -> None:
    config = load_config(preset)
    with torch.device("meta"):
        model, other = model_of(config), transformers_model(config)
    assert count(model) == other.num_parameters()
    converted = to_huggingface(model.state_dict(), config)
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in other.state_dict().items()
    }


# Of base: Transformers. Of the others: the model cards of Omnilingual, whose smaller models are xlsr_300m and xlsr_1b.
# large_lv60 has the architecture of xlsr_300m. In large, convolutions have no biases, and only the first has a norm.
PARAMETERS = {
    "base": 95_044_608,
    "large": 317_390_592 - 7 * 512 - 6 * 2 * 512,
    "large_lv60": 317_390_592,
    "xlsr_300m": 317_390_592,
    "xlsr_1b": 965_514_752,
    "omni_3b": 3_064_124_672,
    "omni_7b": 6_488_487_168,
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_a_preset_has_the_published_number_of_parameters(preset: str) -> None:
    with torch.device("meta"):
        assert count(model_of(load_config(preset))) == PARAMETERS[preset]


@pytest.mark.parametrize(("preset", "millions"), [("xlsr_300m", 317), ("xlsr_1b", 965), ("xlsr_2b", 2162)])
def test_a_preset_has_the_millions_of_parameters_of_its_paper(preset: str, millions: int) -> None:
    """The models of Babu et al. 2021 (arXiv:2111.09296), which gives no exact count of xlsr_2b, and truncates."""
    with torch.device("meta"):
        assert count(model_of(load_config(preset))) // 10**6 == millions


def test_base_prenorm_has_as_many_parameters_as_its_description_adds_up_to() -> None:
    """12 × 768 × 3072, convolutions of 512 channels without bias, 2 × 320 codes of 384, output Linear(768 → 768)."""

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    def norm(channels: int) -> int:
        return 2 * channels

    convolutions = 512 * 10 + 4 * 512 * 512 * 3 + 2 * 512 * 512 * 2 + norm(512)
    projection = norm(512) + linear(512, 768) + 768  # and the mask embedding
    positions = 768 * (768 // 16) * 128 + 128 + 768 + norm(768)  # direction, magnitude, bias, LayerNorm
    block = 4 * linear(768, 768) + linear(768, 3072) + linear(3072, 768) + 2 * norm(768)
    quantizer = linear(768, 640) + 2 * 320 * 384
    expected = convolutions + projection + positions + 12 * block + norm(768) + quantizer + linear(768, 768)
    with torch.device("meta"):
        assert count(model_of(load_config("base_prenorm"))) == expected
    assert math.isclose(expected, 95e6, rel_tol=0.01)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small_state(preset: str, overrides: Sequence[str] = SMALL) -> tuple[dict[str, Tensor], Config]:
    config = load_config(preset, overrides)
    torch.manual_seed(0)
    return model_of(config).state_dict(), config


@pytest.mark.parametrize("preset", ["base", "large_lv60"])
def test_there_and_back_is_bit_identical(preset: str) -> None:
    state, config = small_state(preset, (*SMALL, *OTHER))
    back = from_huggingface(to_huggingface(state, config), config)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_back_and_there_is_bit_identical() -> None:
    config = load_config("base", SMALL)
    theirs = transformers_model(config)
    again = to_huggingface(from_huggingface(theirs.state_dict(), config), config)
    assert again.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_names_of_the_older_weight_norm_are_understood() -> None:
    state, config = small_state("base")
    theirs = to_huggingface(state, config)
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        prefix = "wav2vec2.encoder.pos_conv_embed.conv"
        theirs[f"{prefix}.{old}"] = theirs.pop(f"{prefix}.parametrizations.weight.{new}")
    back = from_huggingface(theirs, config)
    for leaf in ("magnitude", "direction"):
        name = f"encoder.transformer.positional.{leaf}"
        assert torch.equal(back[name], state[name])


def test_converted_tensors_keep_their_type() -> None:
    state, config = small_state("base")
    theirs = to_huggingface({name: tensor.bfloat16() for name, tensor in state.items()}, config)
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("preset", "overrides", "setting"),
    [
        ("base_prenorm", (), "model.conv_padding=true"),
        ("base", ("objective.quantizer_input=projected",), "objective.quantizer_input=projected"),
        ("base", ("objective.target_projection=false",), "objective.target_projection=false"),
        ("base", ("model.conv_padding=true",), "model.conv_padding=true"),
        ("base", ("model.conv_norm_groups=32",), "model.conv_norm_groups=32"),
        ("base", ("model.embedding_norm=false",), "model.embedding_norm=false with model.norm_first=false"),
        ("large_lv60", ("model.embedding_norm=true",), "model.embedding_norm=true with model.norm_first=true"),
        ("base", ("model.max_frames=1024",), "model.max_frames=1024"),
    ],
)
def test_what_transformers_cannot_represent_is_refused_by_name(
    preset: str, overrides: Sequence[str], setting: str
) -> None:
    config = load_config(preset, overrides)
    with torch.device("meta"):
        state = model_of(config).state_dict()
    for convert in (
        lambda: huggingface_config(config),
        lambda: to_huggingface(state, config),
        lambda: from_huggingface({}, config),
    ):
        with pytest.raises(UserError) as error:
            convert()
        assert str(error.value).startswith(setting)
        assert "\n" not in str(error.value)


def test_groups_do_not_matter_where_there_is_no_group_norm() -> None:
    config = load_config("large_lv60", ["model.conv_norm_groups=32"])
    assert huggingface_config(config)["feat_extract_norm"] == "layer"


def test_weights_of_another_model_are_refused() -> None:
    state, config = small_state("base")
    theirs = to_huggingface(state, config)
    fewer = {name: tensor for name, tensor in theirs.items() if name != "project_q.bias"}
    with pytest.raises(UserError, match=r"project_q\.bias is missing \(1 missing"):
        from_huggingface(fewer, config)
    with pytest.raises(UserError, match=r"lm_head\.bias is unknown"):
        from_huggingface({**theirs, "lm_head.bias": torch.zeros(32)}, config)
    more_entries = load_config("base", [*SMALL, "objective.codebook_entries=21"])
    wanted = r"quantizer\.codevectors has shape \[1, 40, 12\], but the settings need \[1, 42, 12\]"
    with pytest.raises(UserError, match=wanted):
        from_huggingface(theirs, more_entries)
    narrow = {"wav2vec2.encoder.layers.1.attention.k_proj.weight": torch.zeros(48, 47)}
    with pytest.raises(UserError, match=r"k_proj\.weight has shape \[48, 47\], but the settings need \[48, 48\]"):
        from_huggingface({**theirs, **narrow}, config)
    with pytest.raises(UserError, match=r"project_q\.bias is torch\.int64, not floating point"):
        from_huggingface({**theirs, "project_q.bias": torch.zeros(24, dtype=torch.int64)}, config)
    with pytest.raises(UserError, match=r"mask_embedding is missing"):
        to_huggingface({name: tensor for name, tensor in state.items() if "mask_embedding" not in name}, config)


@pytest.mark.parametrize("preset", CONVERTIBLE)
def test_the_config_writes_known_keys_and_the_settings_of_pretraining(preset: str) -> None:
    config = load_config(preset)
    written = huggingface_config(config)
    known = {field.name for field in fields(transformers.Wav2Vec2Config)}
    assert written.keys() - known <= {"model_type", "architectures", "w2vscale"}
    assert json.loads(json.dumps(written)) == written
    read = transformers.Wav2Vec2Config(**written)
    assert {key: getattr(read, key) for key in written} == written
    assert (read.mask_time_prob, read.mask_time_length, read.mask_time_min_masks) == (0.65, 10, 2)
    assert read.activation_dropout == 0.0
    assert read.do_stable_layer_norm == (preset not in ("tiny", "base", "large"))
    assert read.feat_extract_norm == ("group" if preset in ("tiny", "base", "large") else "layer")
    assert read.conv_bias == (read.feat_extract_norm == "layer")
    if preset == "base":
        assert (read.feat_proj_dropout, read.feat_quantizer_dropout, read.layerdrop) == (0.1, 0.1, 0.05)
        assert (read.codevector_dim, read.proj_codevector_dim) == (256, 256)
