"""Files of fairseq2, without fairseq2: the tensors of `tests.helpers.fairseq` under its public names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.fairseq import Shape

# From fairseq's name to fairseq2's, by regular expression.
RENAMED = [
    (r"mask_emb", "masker.temporal_mask_embed"),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.", r"encoder_frontend.feature_extractor.layers.\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.", r"encoder_frontend.feature_extractor.layers.\1.layer_norm."),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.", r"encoder_frontend.feature_extractor.layers.\1.group_norm."),
    (r"layer_norm\.", "encoder_frontend.post_extract_layer_norm."),
    (r"post_extract_proj\.", "encoder_frontend.model_dim_proj."),
    (r"encoder\.pos_conv\.0\.", "encoder_frontend.pos_encoder.conv."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"encoder.layers.\1.self_attn.output_proj."),
    (r"encoder\.layers\.(\d+)\.fc1\.", r"encoder.layers.\1.ffn.inner_proj."),
    (r"encoder\.layers\.(\d+)\.fc2\.", r"encoder.layers.\1.ffn.output_proj."),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.", r"encoder.layers.\1.ffn_layer_norm."),
    (r"quantizer\.vars", "quantizer.entries"),
    (r"quantizer\.weight_proj\.", "quantizer.entry_proj."),
    (r"project_q\.", "final_target_proj."),
]
HEADS = ("quantizer.", "project_q.", "final_proj.")


def fairseq2_name(name: str, shape: Shape) -> str:
    """The name in fairseq2 of a tensor of fairseq."""
    if name.startswith("encoder.layer_norm.") and not shape.layer_norm:
        return f"encoder_frontend.{name.removeprefix('encoder.')}"
    for pattern, new in RENAMED:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", new, name)
    return name


def fairseq2_state(fairseq: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """A pretrained model under the names of fairseq2."""
    renamed = {fairseq2_name(name, shape): tensor for name, tensor in fairseq.items()}
    return {**renamed, "quantizer.num_updates": torch.tensor(12)}


def fairseq2_ctc_state(fairseq: Mapping[str, Tensor], shape: Shape, symbols: int, **changes: bool) -> dict[str, Tensor]:
    """A model with that encoder and an output layer. `masks=False`: fine-tuned without masks."""
    encoder = {
        fairseq2_name(name, shape): tensor
        for name, tensor in fairseq.items()
        if not name.startswith(HEADS) and (name != "mask_emb" or changes.get("masks", True))
    }
    head = torch.nn.Linear(shape.dim, symbols, device=encoder["encoder.layers.0.ffn.inner_proj.weight"].device)
    return {**encoder, "final_proj.weight": head.weight.detach(), "final_proj.bias": head.bias.detach()}


def our_settings(shape: Shape, *, heads: int = 4, **objective: Any) -> str:
    """The entry "w2vscale" that this project puts into a file, so that sizes need not be those of a published model."""
    model = {
        "conv_layers": shape.convolutions,
        "conv_norm": "layer" if shape.layer_norm else "group",
        "conv_norm_groups": shape.convolutions[0][0],
        "conv_bias": shape.layer_norm,
        "layers": shape.layers,
        "dim": shape.dim,
        "ffn_dim": shape.ffn_dim,
        "heads": heads,
        "norm_first": shape.layer_norm,
        "embedding_norm": not shape.layer_norm,
        "positional_kernel": shape.kernel,
        "positional_groups": shape.groups,
        "normalize_waveform": shape.layer_norm,
        "waveform_eps": 1e-5,
    }
    pretraining = {
        "name": "wav2vec2",
        "codebooks": shape.codebooks,
        "codebook_entries": shape.entries,
        "codevector_dim": shape.latent_dim,
        "projection_dim": shape.final_dim,
    }
    return json.dumps({"model": model, "regularization": {}, "objective": objective or pretraining})


def save_fairseq2(path: Path, state: Mapping[str, Tensor], **entries: object) -> Path:
    """A file as the published ones are."""
    torch.save({"model": dict(state), **entries}, path)
    return path
