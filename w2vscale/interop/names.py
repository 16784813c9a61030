"""Tensors by other libraries' names and shapes: what both directions of every format share.

Each library has a table: ours: theirs. An entry is a tensor's name, or that of a module, whose tensors are called the
same in both. `{}` is a layer's number; `[qkv]` stands for three of theirs, which are ours one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from w2vscale.checkpoint.expected import expected_of
from w2vscale.config import Config
from w2vscale.config.tree import CtcConfig, ModelConfig
from w2vscale.errors import UserError
from w2vscale.optim.canonical import model_shapes

CODEVECTORS = "quantizer.codevectors"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def to_theirs(
    state: Mapping[str, Tensor], config: ModelConfig, ctc: CtcConfig, table: Mapping[str, str]
) -> dict[str, Tensor]:
    """The `state_dict` of our model by the names of `table`; values and types unchanged.

    Raises:
        UserError: `state` is not one of `config`.
    """
    shapes = _shapes(config, ctc)
    _check_names(state, shapes)
    theirs: dict[str, Tensor] = {}
    for name, parts in _names(shapes, table).items():
        # Copies, because safetensors refuses tensors that share memory.
        pieces = [state[name]] if len(parts) == 1 else [piece.clone() for piece in state[name].chunk(len(parts))]
        theirs.update(zip(parts, pieces, strict=True))
    if CODEVECTORS in state:
        theirs[table[CODEVECTORS]] = state[CODEVECTORS].flatten(0, 1).unsqueeze(0)
    return theirs


def to_ours(
    state: Mapping[str, Tensor], config: ModelConfig, ctc: CtcConfig, table: Mapping[str, str]
) -> dict[str, Tensor]:
    """The `state_dict` of our model, fp32, from one by the names of `table`; the inverse of `to_theirs`.

    Raises:
        UserError: `state` is not one of `config`.
    """
    shapes = _shapes(config, ctc)
    names = _names(shapes, table)
    _check_names(state, [part for parts in names.values() for part in parts])
    ours: dict[str, Tensor] = {}
    for name, parts in names.items():
        rows, *rest = shapes[name]
        wanted, settings = [rows // len(parts), *rest], "the model's settings"
        if name == CODEVECTORS:
            wanted = [1, rows * rest[0], rest[1]]
            settings = " and ".join(
                f"model.{key}={getattr(config, key)}" for key in ("codebooks", "codebook_entries", "codevector_dim")
            )
        for part in parts:
            tensor = state[part]
            if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
                raise UserError(f"tensor {part} is {tensor.dtype} ({tensor.layout}), not dense floating point")
            if list(tensor.shape) != wanted:
                raise UserError(f"tensor {part} has shape {list(tensor.shape)}, but {settings} want {wanted}")
        pieces = [state[part].detach().float() for part in parts]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        ours[name] = whole.reshape(shapes[name]).contiguous()
    return ours


def _shapes(config: ModelConfig, ctc: CtcConfig) -> dict[str, tuple[int, ...]]:
    # Not validated again: rules between other sections do not matter here.
    return model_shapes(expected_of(Config.model_construct(model=config, ctc=ctc), optimizer=False))


def _names(ours: Iterable[str], table: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in ours:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        entry = name.replace(number[0], "{}", 1) if number else name
        module, _, leaf = entry.rpartition(".")
        theirs = table[entry] if entry in table else f"{table[module]}.{leaf}"
        theirs = theirs.replace("{}", number[0]) if number else theirs
        found[name] = tuple(theirs.replace("[qkv]", which) for which in "qkv") if "[qkv]" in theirs else (theirs,)
    return found


def _check_names(state: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    expected = set(expected)
    for names, what in ((expected - state.keys(), "missing"), (state.keys() - expected, "unknown")):
        if names:
            counted = f"tensor {min(names)} is {what} ({len(names)} {what} in all)"
            raise UserError(f"{counted}: no pretraining model of wav2vec 2.0, or one of other settings")
