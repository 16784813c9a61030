"""Checkpoints of fairseq in every form, without fairseq: settings and tensors under its public names, and its forward.

`Reference` computes what the `Wav2Vec2Model` of fairseq does, from those tensors, with functions of PyTorch alone.
"""

from __future__ import annotations

import contextlib
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
import torch
from torch import Tensor
from torch.nn import functional as F

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


def fine_tuned_state(state: dict[str, Tensor], symbols: int) -> dict[str, Tensor]:
    """A model for CTC with this encoder, under the names of fairseq's `Wav2VecCtc`."""
    heads = ("quantizer.", "project_q.", "final_proj.")
    encoder = {f"w2v_encoder.w2v_model.{name}": t for name, t in state.items() if not name.startswith(heads)}
    width = state["mask_emb"].shape[0]
    return {
        **encoder,
        "w2v_encoder.proj.weight": torch.randn(symbols, width) / width**0.5,
        "w2v_encoder.proj.bias": torch.randn(symbols),
    }


def fine_tuned_settings(shape: Shape, **changes: Any) -> dict[str, Any]:
    """The `cfg` of a fine-tuned model, which has those of the pretrained one in it. Masks and dropout are its own."""
    model = {
        "_name": "wav2vec_ctc",
        "w2v_path": "/models/pretrained.pt",
        "no_pretrained_weights": False,
        "dropout_input": 0.0,
        "final_dropout": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.1,
        "apply_mask": True,
        "mask_length": 10,
        "mask_prob": 0.65,
        "mask_channel_length": 64,
        "mask_channel_prob": 0.25,
        "freeze_finetune_updates": 10000,
        "feature_grad_mult": 0.0,
        "layerdrop": 0.05,
        "normalize": shape.layer_norm,
        "w2v_args": all_settings(shape),
        **changes,
    }
    task = {"_name": "audio_finetuning", "labels": "ltr", "sample_rate": 16000, "normalize": shape.layer_norm}
    return {"_name": None, "common": {"seed": 1}, "model": model, "task": task, "criterion": {"_name": "ctc"}}


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
        flat.pop(absent, None)
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
