"""Small checkpoints, what a checkpoint must hold, and checkpoints that do not hold it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from w2vscale.checkpoint.reading import TrainState, file_facts
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config
from w2vscale.distributed.process_group import Ranks
from w2vscale.objectives import state_shapes
from w2vscale.optim.canonical import canonical_shapes

Change = Callable[[dict[str, Tensor], dict[str, list[int]]], object]
"""Changes a file's tensors, and their offsets in whole tensors, in place."""


SHAPES = canonical_shapes({"weight": (7, 5), "bias": (3,)})
"""A small checkpoint, with optimizer state."""


def tensors(value: float = 0.0) -> dict[str, Tensor]:
    """A state with `SHAPES`."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) + value for name, shape in SHAPES.items()}


def store(folder: Path, **settings: Any) -> CheckpointStore:
    """A store of checkpoints with `SHAPES`."""
    return CheckpointStore(folder, Ranks(), expected=SHAPES, **settings)


def save(folder: Path, update: int, **settings: int) -> Path:
    """Commit a checkpoint with `SHAPES`."""
    state = TrainState(update=update, audio_seconds=1.5 * update)
    return store(folder, **settings).save(tensors(float(update)), state, "model: {}\n")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Just these tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def model_and_optimizer(config: Config) -> dict[str, tuple[int, ...]]:
    """What a run with these settings saves."""
    return canonical_shapes(state_shapes(config))


def rewrite(file: Path, change: Change) -> None:
    """Change the tensors of a checkpoint's file, and their offsets, as if they had been written so."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
    offsets = {name: place["saved_offsets"] for name, place in places.items()}
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
    state = json.loads((path / "train_state.json").read_text())
    state["files"] = {name: file_facts(path / name) for name in state["files"]}
    (path / "train_state.json").write_text(json.dumps(state))
