"""Renaming tensors between libraries, and sorting settings into sections: shared by all formats.

Each library has a table {our name: their name}. An entry names a tensor, or a module whose tensors have the same names
in both. `{}` is the number of a layer. `[qkv]` stands for three of their tensors, stacked by rows in one of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from w2vscale.config import ModelConfig, RegularizationConfig, Section
from w2vscale.errors import UserError
from w2vscale.objectives.contrastive import ContrastiveSettings

CODEVECTORS = "quantizer.codevectors"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


PRETRAINING: dict[str, type[Section]] = {
    "model": ModelConfig,
    "regularization": RegularizationConfig,
    "objective": ContrastiveSettings,
}
"""Sections of the settings of a pretraining model. Setting names are unique across these sections."""

Shapes = Mapping[str, tuple[int, ...]]


def by_section(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort the settings of a pretraining model into their sections."""
    return {
        section: {key: value for key, value in settings.items() if key in kind.model_fields}
        for section, kind in PRETRAINING.items()
    }


def to_theirs(state: Mapping[str, Tensor], shapes: Shapes, table: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename our `state_dict`, which has these `shapes`, by `table`. Values and dtypes do not change.

    Tensors outside the encoder that are not in `table` are left out.

    Raises:
        UserError: the names or shapes of `state` are not those in `shapes`.
    """
    _check_names(state, shapes)
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise UserError(f"tensor {name} has shape {list(state[name].shape)}, but the settings need {list(shape)}")
    theirs: dict[str, Tensor] = {}
    for name, parts in _names(shapes, table).items():
        # Cloned because safetensors refuses tensors that share memory.
        tensors = [state[name]] if len(parts) == 1 else [part.clone() for part in state[name].chunk(len(parts))]
        theirs.update(zip(parts, tensors, strict=True))
    if CODEVECTORS in state and CODEVECTORS in table:
        theirs[table[CODEVECTORS]] = state[CODEVECTORS].flatten(0, 1).unsqueeze(0)
    return theirs


def to_ours(state: Mapping[str, Tensor], shapes: Shapes, table: Mapping[str, str]) -> dict[str, Tensor]:
    """Convert a `state_dict` with the names in `table` to ours, with these `shapes`, in fp32.

    Raises:
        UserError: the names, shapes or dtypes of `state` do not fit.
    """
    names = _names(shapes, table)
    _check_names(state, [part for parts in names.values() for part in parts])
    ours: dict[str, Tensor] = {}
    for name, parts in names.items():
        rows, *rest = shapes[name]
        wanted = [1, rows * rest[0], rest[1]] if name == CODEVECTORS else [rows // len(parts), *rest]
        for part in parts:
            tensor = state[part]
            if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
                raise UserError(f"tensor {part} is {tensor.dtype} ({tensor.layout}), not dense floating point")
            if list(tensor.shape) != wanted:
                raise UserError(f"tensor {part} has shape {list(tensor.shape)}, but the settings need {wanted}")
        tensors = [state[part].detach().float() for part in parts]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        ours[name] = whole.reshape(shapes[name]).contiguous()
    return ours


def _names(ours: Iterable[str], table: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in ours:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        entry = name.replace(number[0], "{}", 1) if number else name
        module, _, leaf = entry.rpartition(".")
        if entry not in table and module not in table and not name.startswith("encoder."):
            continue
        theirs = table[entry] if entry in table else f"{table[module]}.{leaf}"
        theirs = theirs.replace("{}", number[0]) if number else theirs
        found[name] = tuple(theirs.replace("[qkv]", which) for which in "qkv") if "[qkv]" in theirs else (theirs,)
    return found


def _check_names(state: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    expected = set(expected)
    for names, what in ((expected - state.keys(), "missing"), (state.keys() - expected, "unknown")):
        if names:
            counted = f"tensor {min(names)} is {what} ({len(names)} {what} in all)"
            raise UserError(f"{counted}: not a wav2vec 2.0 model, or one with other settings")
