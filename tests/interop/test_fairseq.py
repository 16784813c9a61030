"""fairseq's checkpoints: the same features, quantized vectors and settings; nothing in a file is executed.

fairseq itself is not needed: tensors are made here under its public names, and `Reference` computes what its
`Wav2Vec2Model` does, from those tensors, with torch's functions alone.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import typing
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from w2vscale.config import ModelConfig, load_config
from w2vscale.errors import UserError
from w2vscale.interop.fairseq import from_fairseq
from w2vscale.interop.fairseq_file import FairseqCheckpoint, load_fairseq
from w2vscale.interop.huggingface import huggingface_config, to_huggingface
from w2vscale.models.lengths import output_frames
from w2vscale.objectives.contrastive_model import Wav2Vec2ForPretraining

CONVOLUTIONS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
SMALL_CONVOLUTIONS = "[(32, 10, 5)] + [(32, 3, 2)] * 2 + [(40,2,2)]"


@dataclass(frozen=True)
class Shape:
    """What decides the shapes of a model in fairseq."""

    convolutions: tuple[tuple[int, int, int], ...]
    layer_norm: bool  # extractor_mode, conv_bias and layer_norm_first go together in the published models
    layers: int
    dim: int
    ffn_dim: int
    latent_dim: int
    final_dim: int
    codebooks: int = 2
    entries: int = 320
    kernel: int = 128
    groups: int = 16


FULL = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)
NARROW = ((32, 10, 5), (32, 3, 2), (32, 3, 2), (40, 2, 2))
BASE = Shape(FULL, False, 12, 768, 3072, 256, 256)
LARGE = Shape(FULL, False, 24, 1024, 4096, 768, 768)
LARGE_LV60 = Shape(FULL, True, 24, 1024, 4096, 768, 768)
SMALL = {
    "base": Shape(NARROW, False, 3, 48, 96, 24, 20, entries=16, kernel=16, groups=4),
    "large": Shape(NARROW, False, 5, 64, 160, 36, 36, codebooks=3, entries=10, kernel=16, groups=8),
    "large_lv60": Shape(NARROW, True, 4, 64, 128, 32, 32, entries=12, kernel=9, groups=4),
}


def fairseq_state(shape: Shape) -> dict[str, Tensor]:
    """Random tensors under the names of fairseq's `Wav2Vec2Model.state_dict()`."""
    state: dict[str, Tensor] = {}

    def matrix(name: str, *size: int) -> None:
        fan_in = max(int(np.prod(size[1:])), 1)
        state[f"{name}.weight"] = torch.randn(*size) / fan_in**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(size[0])

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width)
        state[f"{name}.bias"] = 0.1 * torch.randn(width)

    state["mask_emb"] = torch.rand(shape.dim)
    inputs = 1
    for index, (channels, kernel, _) in enumerate(shape.convolutions):
        prefix = f"feature_extractor.conv_layers.{index}"
        matrix(f"{prefix}.0", channels, inputs, kernel)
        if not shape.layer_norm:
            del state[f"{prefix}.0.bias"]
        if shape.layer_norm:
            norm(f"{prefix}.2.1", channels)
        elif index == 0:
            norm(f"{prefix}.2", channels)
        inputs = channels
    matrix("post_extract_proj", shape.dim, inputs)
    state["quantizer.vars"] = torch.rand(1, shape.codebooks * shape.entries, shape.latent_dim // shape.codebooks)
    matrix("quantizer.weight_proj", shape.codebooks * shape.entries, inputs)
    matrix("project_q", shape.final_dim, shape.latent_dim)
    state["encoder.pos_conv.0.bias"] = 0.1 * torch.randn(shape.dim)
    state["encoder.pos_conv.0.weight_g"] = 0.5 + torch.rand(1, 1, shape.kernel)
    state["encoder.pos_conv.0.weight_v"] = torch.randn(shape.dim, shape.dim // shape.groups, shape.kernel)
    for index in range(shape.layers):
        prefix = f"encoder.layers.{index}"
        for which in "kvq":
            matrix(f"{prefix}.self_attn.{which}_proj", shape.dim, shape.dim)
        matrix(f"{prefix}.self_attn.out_proj", shape.dim, shape.dim)
        norm(f"{prefix}.self_attn_layer_norm", shape.dim)
        matrix(f"{prefix}.fc1", shape.ffn_dim, shape.dim)
        matrix(f"{prefix}.fc2", shape.dim, shape.ffn_dim)
        norm(f"{prefix}.final_layer_norm", shape.dim)
    norm("encoder.layer_norm", shape.dim)
    norm("layer_norm", inputs)
    matrix("final_proj", shape.final_dim, shape.dim)
    return state


def model_settings(shape: Shape, **changes: Any) -> dict[str, Any]:
    """`cfg["model"]` of fairseq, as its configs for these models have it."""
    return {
        "_name": "wav2vec2",
        "extractor_mode": "layer_norm" if shape.layer_norm else "default",
        "encoder_layers": shape.layers,
        "encoder_embed_dim": shape.dim,
        "encoder_ffn_embed_dim": shape.ffn_dim,
        "encoder_attention_heads": {768: 12, 1024: 16}.get(shape.dim, 4),
        "activation_fn": "gelu",
        "dropout": 0.0,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "dropout_input": 0.1,
        "dropout_features": 0.1,
        "final_dim": shape.final_dim,
        "layer_norm_first": shape.layer_norm,
        "conv_feature_layers": CONVOLUTIONS if shape.convolutions == FULL else SMALL_CONVOLUTIONS,
        "conv_bias": shape.layer_norm,
        "logit_temp": 0.1,
        "quantize_targets": True,
        "quantize_input": False,
        "same_quantizer": False,
        "target_glu": False,
        "feature_grad_mult": 0.03,
        "latent_vars": shape.entries,
        "latent_groups": shape.codebooks,
        "latent_dim": 0,
        "mask_length": 10,
        "mask_prob": 0.65,
        "mask_selection": "static",
        "mask_other": 0.0,
        "no_mask_overlap": False,
        "mask_min_space": 1,
        "mask_channel_prob": 0.0,
        "mask_channel_selection": "static",
        "num_negatives": 100,
        "negatives_from_everywhere": False,
        "cross_sample_negatives": 0,
        "codebook_negatives": 0,
        "conv_pos": shape.kernel,
        "conv_pos_groups": shape.groups,
        "latent_temp": [2.0, 0.1, 0.999995],
        **changes,
    }


def all_settings(shape: Shape, **changes: Any) -> dict[str, Any]:
    """The `cfg` of a checkpoint: its sections."""
    penalty = 0.0 if shape.layer_norm else 10.0
    return {
        "_name": None,
        "common": {"seed": 1, "fp16": True},
        "model": model_settings(shape, **changes),
        "task": {"_name": "audio_pretraining", "sample_rate": 16000, "normalize": shape.layer_norm, "eval_wer": False},
        "criterion": {"_name": "wav2vec", "infonce": True, "loss_weights": [0.1, penalty], "log_keys": ["temp"]},
    }


def save_new(path: Path, state: dict[str, Tensor], cfg: Any, **entries: Any) -> Path:
    """A checkpoint of fairseq's trainer since the end of 2020."""
    contents = {
        "args": None,
        "cfg": cfg,
        "model": state,
        "criterion": None,
        "optimizer_history": [{"criterion_name": "Wav2vecCriterion", "num_updates": 3, "lr_scheduler_state": {}}],
        "task_state": {},
        "extra_state": {"metrics": {}, "previous_training_time": 1.5, "val_loss": 2.0},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }
    torch.save({**contents, **entries}, path)
    return path


def save_old(path: Path, state: dict[str, Tensor], cfg: dict[str, Any], *, zipped: bool) -> Path:
    """A checkpoint of 2020: one flat Namespace, in which lists are text, and no defaults beside those of the task."""
    flat = {**cfg["common"], **cfg["criterion"], **cfg["task"], **cfg["model"]}
    flat = {name: str(value) if isinstance(value, list) else value for name, value in flat.items()}
    for absent in ("_name", "extractor_mode", "conv_bias"):  # as in wav2vec_small.pt
        del flat[absent]
    contents = {
        "args": Namespace(arch="wav2vec2", adam_betas="(0.9,0.98)", **flat),
        "model": state,
        "optimizer_history": [{"best_loss": np.float64(1.5)}],
        "extra_state": {"epoch": 1},
        "last_optimizer_state": {},
    }
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    return path


@dataclass
class Reference:
    """fairseq's forward in evaluation, of one utterance, from tensors under its names."""

    state: dict[str, Tensor]
    shape: Shape
    heads: int

    def affine(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def extract(self, waveform_S: Tensor) -> Tensor:
        """Features [T, C], normalised."""
        x_CT = waveform_S.unsqueeze(0)
        for index, (channels, _, stride) in enumerate(self.shape.convolutions):
            prefix = f"feature_extractor.conv_layers.{index}"
            weight, bias = self.state[f"{prefix}.0.weight"], self.state.get(f"{prefix}.0.bias")
            x_CT = F.conv1d(x_CT.unsqueeze(0), weight, bias, stride=stride).squeeze(0)
            if self.shape.layer_norm:
                x_CT = self.norm(f"{prefix}.2.1", x_CT.T).T
            elif index == 0:
                scale, shift = self.state[f"{prefix}.2.weight"], self.state[f"{prefix}.2.bias"]
                x_CT = F.group_norm(x_CT.unsqueeze(0), channels, scale, shift).squeeze(0)
            x_CT = F.gelu(x_CT)
        return self.norm("layer_norm", x_CT.T)

    def positions(self, x_TD: Tensor) -> Tensor:
        direction, magnitude = self.state["encoder.pos_conv.0.weight_v"], self.state["encoder.pos_conv.0.weight_g"]
        length = direction.square().sum(dim=(0, 1), keepdim=True).sqrt()
        y_DT = F.conv1d(
            x_TD.T.unsqueeze(0),
            direction / length * magnitude,
            self.state["encoder.pos_conv.0.bias"],
            padding=self.shape.kernel // 2,
            groups=self.shape.groups,
        ).squeeze(0)
        if self.shape.kernel % 2 == 0:  # SamePad
            y_DT = y_DT[:, :-1]
        return F.gelu(y_DT).T

    def attend(self, prefix: str, x_TD: Tensor) -> Tensor:
        frames, dim = x_TD.shape
        q_HTE, k_HTE, v_HTE = (
            self.affine(f"{prefix}.{which}_proj", x_TD).view(frames, self.heads, -1).transpose(0, 1) for which in "qkv"
        )
        scores_HTT = (q_HTE * (dim // self.heads) ** -0.5) @ k_HTE.transpose(1, 2)
        y_HTE = scores_HTT.softmax(dim=2) @ v_HTE
        return self.affine(f"{prefix}.out_proj", y_HTE.transpose(0, 1).reshape(frames, dim))

    def block(self, index: int, x_TD: Tensor) -> Tensor:
        prefix = f"encoder.layers.{index}"

        def feed_forward(y_TD: Tensor) -> Tensor:
            return self.affine(f"{prefix}.fc2", F.gelu(self.affine(f"{prefix}.fc1", y_TD)))

        first, second = f"{prefix}.self_attn_layer_norm", f"{prefix}.final_layer_norm"
        if self.shape.layer_norm:
            x_TD = x_TD + self.attend(f"{prefix}.self_attn", self.norm(first, x_TD))
            return x_TD + feed_forward(self.norm(second, x_TD))
        x_TD = self.norm(first, x_TD + self.attend(f"{prefix}.self_attn", x_TD))
        return self.norm(second, x_TD + feed_forward(x_TD))

    def encode(self, waveform_S: Tensor) -> list[Tensor]:
        """The blocks' input, each block's output, and the context: [T, D] each."""
        x_TD = self.affine("post_extract_proj", self.extract(waveform_S))
        x_TD = x_TD + self.positions(x_TD)
        if not self.shape.layer_norm:
            x_TD = self.norm("encoder.layer_norm", x_TD)
        hidden = [x_TD]
        for index in range(self.shape.layers):
            hidden.append(self.block(index, hidden[-1]))
        context_TD = self.norm("encoder.layer_norm", hidden[-1]) if self.shape.layer_norm else hidden[-1]
        return [*hidden, context_TD]

    def quantize(self, waveform_S: Tensor) -> Tensor:
        """Quantized vectors [T, latent_dim]: the likeliest entry of each group, one group beside the other."""
        logits_TGV = self.affine("quantizer.weight_proj", self.extract(waveform_S)).view(
            -1, self.shape.codebooks, self.shape.entries
        )
        entry_TG = logits_TGV.argmax(dim=2) + torch.arange(self.shape.codebooks) * self.shape.entries
        return self.state["quantizer.vars"][0, entry_TG].flatten(1)


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value."""
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def build(path: Path) -> tuple[Wav2Vec2ForPretraining, ModelConfig]:
    config, state = from_fairseq(load_fairseq(path))
    model = Wav2Vec2ForPretraining(config).eval()
    model.load_state_dict(state)
    return model, config


@pytest.fixture(scope="module", params=SMALL.values(), ids=SMALL.keys())
def shape(request: pytest.FixtureRequest) -> Shape:
    torch.manual_seed(5)
    return request.param


@torch.no_grad()
def test_every_hidden_state_is_that_of_fairseq(shape: Shape, tmp_path: Path) -> None:
    state = fairseq_state(shape)
    model, config = build(save_new(tmp_path / "model.pt", state, all_settings(shape)))
    reference = Reference(state, shape, config.heads)
    for waveform in (torch.randn(3000), torch.randn(2345)):
        theirs = reference.encode(waveform)
        encoded = model.encoder(waveform.unsqueeze(0))
        assert_equal(encoded.normalised_BTC[0], reference.extract(waveform))
        assert len(theirs) == config.layers + 2
        for our_BTD, their_TD in zip([*encoded.hidden, encoded.context_BTD], theirs, strict=True):
            assert_equal(our_BTD[0], their_TD)


@torch.no_grad()
def test_utterances_of_a_padded_batch_are_each_as_fairseq_has_them_alone(shape: Shape, tmp_path: Path) -> None:
    state = fairseq_state(shape)
    model, config = build(save_new(tmp_path / "model.pt", state, all_settings(shape)))
    reference = Reference(state, shape, config.heads)
    waveforms = [torch.randn(3000), torch.randn(2100)]
    lengths_B = torch.tensor([len(waveform) for waveform in waveforms])
    frames_B = torch.tensor([output_frames(len(waveform), config) for waveform in waveforms])
    padded_BS = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    encoded = model.encoder(padded_BS, lengths_B, frames_B)
    for row, waveform in enumerate(waveforms):
        theirs = reference.encode(waveform)
        for our_BTD, their_TD in zip([*encoded.hidden, encoded.context_BTD], theirs, strict=True):
            assert_equal(our_BTD[row, : frames_B[row]], their_TD)


@torch.no_grad()
def test_quantizer_and_projections_are_those_of_fairseq_also_in_transformers(shape: Shape, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    state = fairseq_state(shape)
    model, config = build(save_new(tmp_path / "model.pt", state, all_settings(shape)))
    other = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**huggingface_config(config))).eval()
    other.load_state_dict(to_huggingface(model.state_dict(), config))
    reference = Reference(state, shape, config.heads)
    waveform = torch.randn(3000)
    vectors_TD = reference.quantize(waveform)
    targets_TP = reference.affine("project_q", vectors_TD)
    context_TP = reference.affine("final_proj", reference.encode(waveform)[-1])

    encoded = model.encoder(waveform.unsqueeze(0))
    quantized = model.quantizer(encoded.normalised_BTC[0], None, 1.0)
    assert_equal(quantized.vectors_MD, vectors_TD)
    assert_equal(objective.target_projection(quantized.vectors_MD), targets_TP)
    assert_equal(model.context_projection(encoded.context_BTD[0]), context_TP)
    theirs = other(waveform.unsqueeze(0))
    assert_equal(theirs.projected_quantized_states[0], targets_TP)
    assert_equal(theirs.projected_states[0], context_TP)
    assert torch.equal(model.encoder.mask_embedding, state["mask_emb"])


def test_names_of_the_newer_weight_norm_and_half_precision_are_understood(tmp_path: Path) -> None:
    shape = SMALL["base"]
    state = fairseq_state(shape)
    _, expected = from_fairseq(FairseqCheckpoint(tmp_path, state, model_settings(shape)))
    prefix = "encoder.pos_conv.0"
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state[f"{prefix}.parametrizations.weight.{new}"] = state.pop(f"{prefix}.{old}")
    _, again = from_fairseq(FairseqCheckpoint(tmp_path, state, model_settings(shape)))
    half = {name: tensor.half() for name, tensor in state.items()}
    _, halved = from_fairseq(FairseqCheckpoint(tmp_path, half, model_settings(shape)))
    assert again.keys() == expected.keys() == halved.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor)
        assert halved[name].dtype == torch.float32
        assert torch.equal(halved[name], tensor.half().float())


def published(shape: Shape, **changes: Any) -> FairseqCheckpoint:
    """A model of full size, without memory."""
    with torch.device("meta"):
        state = fairseq_state(shape)
    cfg = all_settings(shape, **changes)
    return FairseqCheckpoint(Path("full.pt"), state, {**cfg["criterion"], **cfg["task"], **cfg["model"]})


NO_DROPOUT = {"attention_dropout": 0.0, "dropout_input": 0.0, "dropout_features": 0.0, "feature_grad_mult": 1.0}
PUBLISHED = {
    "base": (
        BASE,
        {"dropout": 0.1, "encoder_layerdrop": 0.05, "feature_grad_mult": 0.1, "latent_temp": "(2,0.5,0.999995)"},
    ),
    "large": (LARGE, {}),
    "large_lv60": (LARGE_LV60, NO_DROPOUT),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_settings_of_the_published_models_are_those_of_our_presets(preset: str) -> None:
    shape, changes = PUBLISHED[preset]
    checkpoint = published(shape, **changes)
    config, state = from_fairseq(checkpoint)
    assert config == load_config(preset).model
    bare, bare_state = from_fairseq(FairseqCheckpoint(checkpoint.path, checkpoint.state, {}))
    assert bare_state.keys() == state.keys()
    assert {"heads", "conv_layers", "normalize_waveform"} <= bare.model_fields_set
    assert all(getattr(bare, name) == getattr(config, name) for name in bare.model_fields_set)


def test_settings_of_training_are_taken_over(tmp_path: Path) -> None:
    changes = {"mask_prob": 0.5, "mask_length": 7, "num_negatives": 50, "logit_temp": 0.2, "activation_dropout": 0.3}
    path = save_new(tmp_path / "model.pt", fairseq_state(SMALL["large"]), all_settings(SMALL["large"], **changes))
    _, config = build(path)
    assert (config.mask_probability, config.mask_length, config.negatives) == (0.5, 7, 50)
    assert (config.logit_temperature, config.activation_dropout) == (0.2, 0.3)
    assert (config.gumbel_start, config.gumbel_end, config.gumbel_decay) == (2.0, 0.1, 0.999995)
    assert (config.codebooks, config.codebook_entries, config.codevector_dim) == (3, 10, 36)
    assert config.conv_layers == NARROW
    assert (config.positional_kernel, config.positional_groups) == (16, 8)


# Files of fairseq ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def modules(**contents: dict[str, type]) -> Iterator[None]:
    """Modules that exist while a file is written; "__" in a name stands for a dot."""
    made = {}
    for underscored, classes in contents.items():
        name = underscored.replace("__", ".")
        made[name] = ModuleType(name)
        for attribute, kind in classes.items():
            kind.__module__, kind.__qualname__ = name, attribute
            setattr(made[name], attribute, kind)
    parents = {name.rpartition(".")[0] for name in made}
    made.update({name: ModuleType(name) for name in parents | {"fairseq", "omegaconf"} if name and name not in made})
    assert not made.keys() & sys.modules.keys()
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def save_omegaconf(path: Path, state: dict[str, Tensor], cfg: dict[str, Any]) -> Path:
    """A checkpoint whose `cfg` is a DictConfig, with what else of fairseq's own has been seen in checkpoints."""

    class Node:
        pass

    class DictConfig(Node):
        pass

    class ListConfig(Node):
        pass

    class AnyNode(Node):
        pass

    class EnumNode(Node):
        pass

    class ContainerMetadata:
        pass

    class Dictionary:
        pass

    class AverageMeter:
        pass

    class Choices(Enum):
        static = "static"
        uniform = "uniform"

    def node(kind: type, parent: Any, **content: Any) -> Any:
        made, metadata = kind(), ContainerMetadata()
        metadata.__dict__.update(ref_type=typing.Any, object_type=dict, key_type=str, flags={})
        metadata.element_type = typing.Optional[typing.Tuple[float, float]]  # noqa: UP006, UP045 (as fairseq has it)
        made.__dict__.update(_metadata=metadata, _parent=parent, _resolver_cache=defaultdict(dict, env={}), **content)
        return made

    def config(value: Any, parent: Any = None) -> Any:
        if isinstance(value, dict):
            made = node(DictConfig, parent, _content={})
            made._content.update({key: config(item, made) for key, item in value.items()})
            return made
        if isinstance(value, list):
            made = node(ListConfig, parent, _content=[])
            made._content.extend(config(item, made) for item in value)
            return made
        if value == "static":
            return node(EnumNode, parent, _val=Choices.static)
        return node(AnyNode, parent, _val=value)

    dictionary, meter = Dictionary(), AverageMeter()
    dictionary.__dict__.update(symbols=["<s>"], indices={"<s>": 0})
    meter.__dict__.update(val=np.float32(1.0), sum=torch.ones(()), count=3)
    with modules(
        omegaconf__dictconfig={"DictConfig": DictConfig},
        omegaconf__listconfig={"ListConfig": ListConfig},
        omegaconf__nodes={"AnyNode": AnyNode, "EnumNode": EnumNode},
        omegaconf__base={"ContainerMetadata": ContainerMetadata},
        fairseq__dataclass__constants={"Choices": Choices},
        fairseq__data__dictionary={"Dictionary": Dictionary},
        fairseq__logging__meters={"AverageMeter": AverageMeter},
    ):
        return save_new(
            path,
            state,
            config(cfg),
            task_state={"target_dictionary": dictionary},
            extra_state={"meters": [meter], "best": np.float64(1.5), "history": np.ones(2), "folder": Path("/data")},
        )


FORMS: dict[str, Callable[[Path, dict[str, Tensor], dict[str, Any]], Path]] = {
    "Namespace": lambda path, state, cfg: save_old(path, state, cfg, zipped=True),
    "Namespace before PyTorch 1.6": lambda path, state, cfg: save_old(path, state, cfg, zipped=False),
    "dict of Namespaces": lambda path, state, cfg: save_new(path, state, {**cfg, "model": Namespace(**cfg["model"])}),
    "omegaconf": save_omegaconf,
}


@pytest.mark.parametrize("name", ["base", "large_lv60"])
@pytest.mark.parametrize("form", FORMS)
def test_settings_are_read_from_every_form_of_checkpoint(form: str, name: str, tmp_path: Path) -> None:
    state, cfg = fairseq_state(SMALL[name]), all_settings(SMALL[name])
    allowed_before = set(torch.serialization.get_safe_globals())
    expected = from_fairseq(load_fairseq(save_new(tmp_path / "plain.pt", state, cfg)))
    checkpoint = load_fairseq(FORMS[form](tmp_path / "model.pt", state, cfg))
    assert checkpoint.path == tmp_path / "model.pt"
    assert checkpoint.state.keys() == state.keys()
    assert checkpoint.settings["encoder_attention_heads"] == 4
    assert checkpoint.settings["normalize"] == (name == "large_lv60")
    assert checkpoint.settings["mask_selection"] == "static"
    again = from_fairseq(checkpoint)
    assert again[0] == expected[0]
    for tensor_name, tensor in expected[1].items():
        assert torch.equal(again[1][tensor_name], tensor)
    assert not {"fairseq", "omegaconf"} & sys.modules.keys()
    assert set(torch.serialization.get_safe_globals()) == allowed_before


def test_settings_are_empty_where_there_are_none(tmp_path: Path) -> None:
    torch.save({"model": fairseq_state(SMALL["base"])}, tmp_path / "model.pt")
    checkpoint = load_fairseq(tmp_path / "model.pt")
    assert checkpoint.settings == {}
    with pytest.raises(UserError, match="settings lack encoder_attention_heads"):
        from_fairseq(checkpoint)


# Refusals --------------------------------------------------------------------------------------------------------


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        act()
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantize_targets": False}, "quantize_targets=False"),
        ({"quantize_input": True}, "quantize_input=True"),
        ({"same_quantizer": True}, "same_quantizer=True"),
        ({"quantizer_depth": 2}, "quantizer_depth=2"),
        ({"target_glu": True}, "target_glu=True"),
        ({"negatives_from_everywhere": True}, "negatives_from_everywhere=True"),
        ({"cross_sample_negatives": 10}, "cross_sample_negatives=10"),
        ({"codebook_negatives": 10}, "codebook_negatives=10"),
        ({"layer_type": "conformer"}, "layer_type=conformer"),
        ({"pos_enc_type": "rope"}, "pos_enc_type=rope"),
        ({"activation_fn": "relu"}, "activation_fn=relu"),
        ({"pos_conv_depth": 5}, "pos_conv_depth=5"),
        ({"mask_selection": "uniform"}, "mask_selection=uniform"),
        ({"mask_channel_prob": 0.5}, "mask_channel_prob=0.5"),
        ({"latent_temp": "(2,0.5)"}, "latent_temp=(2, 0.5)"),
        ({"mask_prob": 0.0}, "objective.mask_probability=0.0"),
        ({"dropout": "${model.x}"}, "regularization.dropout='${model.x}'"),
        ({"encoder_attention_heads": 5}, "heads=5 does not divide dim=48"),
        ({"encoder_attention_heads": None}, "settings lack encoder_attention_heads"),
        ({"conv_feature_layers": None}, "settings lack conv_feature_layers"),
        ({"conv_feature_layers": "[(32, 10, 5)] * 4"}, "does not fit the weights"),
        ({"conv_feature_layers": "[(32, 10, 5)] * 10 ** 9"}, "not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": "[(32, 10, 5)] * 999 * 999"}, "not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": "__import__('os').getpid()"}, "not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": "(" * 900}, "not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": 7}, "not a list of (channels, kernel, stride)"),
    ],
)
def test_what_our_model_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    shape = SMALL["base"]
    checkpoint = FairseqCheckpoint(Path("some.pt"), fairseq_state(shape), model_settings(shape, **changes))
    message = refusal(lambda: from_fairseq(checkpoint))
    assert message.startswith("some.pt: ") and named in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("post_extract_proj.weight"), "post_extract_proj.weight is missing (1 missing"),
        (lambda state: state.pop("quantizer.vars"), "quantizer.vars is missing"),
        (lambda state: state.pop("encoder.pos_conv.0.weight_v"), "encoder.pos_conv.0.weight_v is missing"),
        (lambda state: state.pop("encoder.layers.1.fc2.bias"), "encoder.layers.1.fc2.bias is missing"),
        (lambda state: state.pop("feature_extractor.conv_layers.2.0.weight"), "conv_layers.2.0.weight is missing"),
        (lambda state: state.clear(), "is missing"),
        (lambda state: state.update({"target_glu.0.bias": torch.ones(3)}), "target_glu.0.bias is unknown (1 unknown"),
        (lambda state: state.update({"layer_norm.bias": torch.ones(3)}), "layer_norm.bias has shape [3]"),
        (
            lambda state: state.update({"mask_emb": torch.ones(48).int()}),
            "mask_emb is torch.int32 (torch.strided), not dense",
        ),
        (
            lambda state: state.update({"mask_emb": torch.ones(48).to_sparse()}),
            "mask_emb is torch.float32 (torch.sparse_coo), not",
        ),
        (lambda state: state.update({"quantizer.vars": torch.ones(3)}), "quantizer.vars has 1 dimensions"),
        (lambda state: state.update({"quantizer.vars": torch.ones(1, 0, 0)}), "codebook_entries=0"),
        (lambda state: state.update({"w2v_encoder.proj.weight": torch.ones(3)}), "fine-tuned model"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change: Callable[[dict[str, Tensor]], Any], named: str) -> None:
    shape = SMALL["base"]
    state = fairseq_state(shape)
    change(state)
    message = refusal(lambda: from_fairseq(FairseqCheckpoint(Path("some.pt"), state, model_settings(shape))))
    assert message.startswith("some.pt: ") and named in message


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    assert "No such file" in refusal(lambda: load_fairseq(path))
    assert "Is a directory" in refusal(lambda: load_fairseq(tmp_path))
    for contents in (b"", b"no checkpoint\n", b"PK\x03\x04 nothing", pickle.dumps({"model": {}}, protocol=2)):
        path.write_bytes(contents)
        assert "cut short or damaged" in refusal(lambda: load_fairseq(path))
    for found in ([1], {"args": None}, {"model": None}):
        torch.save(found, path)
        assert 'no entry "model"' in refusal(lambda: load_fairseq(path))
    for found in ({"model": {"weight": 3}}, {"model": {3: torch.ones(1)}}, {"model": [torch.ones(1)]}):
        torch.save(found, path)
        assert "is not a dictionary of tensors" in refusal(lambda: load_fairseq(path))
    state, cfg = fairseq_state(SMALL["base"]), all_settings(SMALL["base"])
    for zipped in (True, False):
        contents = save_old(path, state, cfg, zipped=zipped).read_bytes()
        for share in (0.01, 0.5, 0.9, 0.999):
            path.write_bytes(contents[: int(share * len(contents))])
            assert "cut short or damaged" in refusal(lambda: load_fairseq(path))


def test_pytorchs_advice_to_execute_a_file_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(torch.nn.ReLU()).save(path)
    assert refusal(lambda: load_fairseq(path)) == f"{path} is refused: it is a TorchScript program, not a checkpoint"
    for zipped in (True, False):
        torch.save({"model": {}}, path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
        assert "was saved with pickle_protocol=4 or above" in refusal(lambda: load_fairseq(path))
    for contents in (
        b"no checkpoint\n",
        pickle.dumps(torch.ones(1), protocol=2),
        pickle.dumps(Call(print), protocol=2),
    ):
        path.write_bytes(contents)
        message = refusal(lambda: load_fairseq(path))
        assert "weights_only" not in message and "Re-running" not in message


class Call:
    """Pickled as a call, which plain unpickling executes."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def attacks(marker: Path) -> dict[str, tuple[Any, str]]:
    """Objects that make a file at `marker` when they are unpickled carelessly, and what their refusal names."""
    import builtins
    import operator
    import os
    import subprocess

    write = f"open({str(marker)!r}, 'w').close()"
    touch = f"touch {marker}"
    return {
        "os.system": (Call(os.system, touch), "posix.system"),
        "builtins.eval": (Call(eval, write), "eval"),
        "builtins.exec": (Call(exec, write), "exec"),
        "subprocess": (Call(subprocess.check_call, ["touch", str(marker)]), ".check_call"),
        "getattr": (Call(getattr, Call(builtins.__import__, "os"), "system"), "getattr"),
        "operator.methodcaller": (Call(operator.methodcaller, "system", touch), "operator.methodcaller"),
        "torch.load": (Call(torch.load, str(marker)), "torch.serialization.load"),
        "torch.storage": (Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, touch))), "torch.storage"),
        "torch.hub": (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        "a file": (Call(open, str(marker), "w"), "open"),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", attacks(Path()))
def test_malicious_files_are_refused_and_not_executed(attack: str, zipped: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "model.pt"
    payload, named = attacks(marker)[attack]
    torch.save({"model": fairseq_state(SMALL["base"]), "cfg": payload}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: load_fairseq(path))
    assert named in message and "could run code" in message
    assert not marker.exists()


def test_the_attacks_would_work_where_files_are_trusted(tmp_path: Path) -> None:
    for number, name in enumerate(("os.system", "builtins.eval", "torch.storage")):
        marker = tmp_path / str(number)
        payload, _ = attacks(marker)[name]
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(payload))
        assert marker.exists(), name


def test_a_bare_pickle_with_a_call_is_not_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "model.pt"
    for payload, _ in attacks(marker).values():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps({"model": payload}, protocol=protocol))
            refusal(lambda: load_fairseq(path))
            assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_allowed_names_are_inert_even_where_such_a_class_exists(zipped: bool, tmp_path: Path) -> None:
    """A class of fairseq's or omegaconf's that acts when it is made, called or filled is never reached."""
    marker, path = tmp_path / "executed", tmp_path / "model.pt"

    class DictConfig:
        def __new__(cls, *args: Any) -> Any:
            if args:
                marker.touch()
            return super().__new__(cls)

        def __setstate__(self, state: Any) -> None:
            marker.touch()

    class Evil:
        pass

    payload = {
        "called": Call(DictConfig, "touch", state={"_content": {"dropout": 0.3}}),
        "filled": Call(DictConfig, state=({"__class__": 3}, {"__class__": Evil})),
        "called with a class": Call(Evil, DictConfig, list),
        "Namespace": Call(Namespace, state={"__class__": Evil}),
    }
    state, model = fairseq_state(SMALL["base"]), model_settings(SMALL["base"])
    with modules(omegaconf__dictconfig={"DictConfig": DictConfig}, fairseq__utils={"Evil": Evil}):
        marker.unlink(missing_ok=True)
        torch.save(
            {"model": state, "cfg": {"model": {**model, "dropout": payload}}, "task_state": payload},
            path,
            _use_new_zipfile_serialization=zipped,
        )
        checkpoint = load_fairseq(path)
        assert not marker.exists()
    assert checkpoint.settings["dropout"]["called"] == {"dropout": 0.3}
    assert "regularization.dropout=" in refusal(lambda: from_fairseq(checkpoint))


def test_a_stand_in_does_not_take_the_place_of_a_tensor(tmp_path: Path) -> None:
    class Tensor:
        pass

    with modules(fairseq__tensor={"Tensor": Tensor}):
        torch.save({"model": {"mask_emb": Tensor()}}, tmp_path / "model.pt")
    assert "is not a dictionary of tensors" in refusal(lambda: load_fairseq(tmp_path / "model.pt"))


def test_settings_that_contain_themselves_are_refused(tmp_path: Path) -> None:
    cfg: dict[str, Any] = {"model": {}}
    cfg["model"]["again"] = cfg
    torch.save({"model": {"mask_emb": torch.ones(1)}, "cfg": cfg}, tmp_path / "model.pt")
    assert "settings are nested too deeply" in refusal(lambda: load_fairseq(tmp_path / "model.pt"))
