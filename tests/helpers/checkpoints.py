"""Small checkpoints, what a checkpoint must hold, and checkpoints that do not hold it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from w2vscale.checkpoint.format import Document, TrainState, encode, file_facts, read_document
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.distributed.process_group import Ranks
from w2vscale.optim.canonical import TensorSpec, expected_tensors

Change = Callable[[dict[str, Tensor], dict[str, list[int]]], object]
"""Changes a file's tensors, and their offsets in whole tensors, in place."""


def expected_of_parameters(shapes: Mapping[str, tuple[int, ...]], *, optimizer: bool = True) -> dict[str, TensorSpec]:
    """What a checkpoint of a model with just these parameters holds."""
    model = nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
    return expected_tensors(model, optimizer=optimizer)


SHAPES = {"weight": (7, 5), "bias": (3,)}
SPECS = expected_of_parameters(SHAPES)
"""A small checkpoint, with optimizer state."""


def tensors(value: float = 0.0) -> dict[str, Tensor]:
    """A state with `SPECS`."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(spec.shape, generator=generator) + value for name, spec in SPECS.items()}


def store(folder: Path, **settings: Any) -> CheckpointStore:
    """A store of checkpoints with `SPECS`."""
    return CheckpointStore(folder, Ranks(), expected=SPECS, **settings)


def save(folder: Path, update: int, **settings: int) -> Path:
    """Commit a checkpoint with `SPECS`."""
    state = TrainState(update=update, audio_seconds=1.5 * update)
    return store(folder, **settings).save(tensors(float(update)), state, "model: {}\n")


def rewrite(file: Path, change: Change) -> None:
    """Change the tensors of a checkpoint's file, and their offsets, as if they had been written so."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        places = json.loads(opened.metadata().get("DCP_SHARDING_INFO", "{}"))
    offsets = {name: [0] * tensor.dim() for name, tensor in tensors.items()}
    offsets |= {name: place["saved_offsets"] for name, place in places.items()}
    change(tensors, offsets)
    places = {name: {"saved_offsets": offsets[name]} for name in tensors}
    save_file(tensors, file, metadata={"DCP_SHARDING_INFO": json.dumps(places)})


def drop(path: Path, *parts: str) -> list[str]:
    """Take the tensors whose names contain one of `parts` out of a committed checkpoint, as earlier versions could
    commit it; returns their names."""
    dropped: set[str] = set()

    def change(tensors: dict[str, Tensor], offsets: dict[str, list[int]]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]
            dropped.add(name)

    change_committed(path, change)
    return sorted(dropped)


def change_committed(path: Path, change: Change) -> None:
    """`rewrite` all files of a checkpoint, and what is recorded of them."""
    for file in path.glob("*.safetensors"):
        rewrite(file, change)
    seal(path)


def seal(path: Path, **changes: Any) -> None:
    """Make train_state.json agree with the files as they are, and change its state."""
    old = read_document(path)
    new = Document(replace(old.state, **changes), {name: file_facts(path / name) for name in old.files}, old.ranks)
    (path / "train_state.json").write_text(encode(new))
