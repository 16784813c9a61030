"""Datasets of small manifests, and the inputs that an objective makes of a test's own audio."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from w2vscale.config import Config, load_config
from w2vscale.data.assembly import Assembler
from w2vscale.data.indexed import MicroBatches, make_plan
from w2vscale.data.inputs import Utterance
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.plan import Plan
from w2vscale.data.randomness import Stream, generator
from w2vscale.objectives import Objective, build_objective


def config_with(*overrides: str) -> Config:
    """The preset `tiny` with micro-batches of a few utterances, loaded in the main process."""
    settings = ["data.max_seconds=3", "data.min_seconds=1", "data.workers=0", "batch.max_seconds=10"]
    return load_config("tiny", [*settings, "batch.micro_batches=2", *overrides])


def plan_of(corpus: Corpus, config: Config, *, seed: int = 0, mixed: bool = False) -> Plan:
    """The plan of a corpus with these settings."""
    return make_plan(
        corpus,
        build_objective(config),
        model=config.model,
        data=config.data,
        batch=config.batch,
        seed=seed,
        mix=config.mix if mixed else None,
    )


def dataset_of(manifest: Path, config: Config, *, seed: int = 7) -> MicroBatches:
    """The micro-batches of a manifest."""
    corpus = Corpus([manifest], schemes=config.data.url_schemes)
    assemble = Assembler(build_objective(config), config.model, seed=seed)
    return MicroBatches(corpus, plan_of(corpus, config, seed=seed), assemble, config.data)


def windows_of(
    dataset: MicroBatches, updates: range, *, micro_batches: int = 2, rank: int = 0, world_size: int = 1
) -> Iterator[list[MicroBatch]]:
    """The windows of one rank, by default of all two micro-batches of an update."""
    return dataset.windows(updates, micro_batches=micro_batches, rank=rank, world_size=world_size)


def inputs_of(
    objective: Objective,
    waveforms: Sequence[NDArray[np.float32]],
    targets: Sequence[Any] | None = None,
    *,
    places: Sequence[int] | None = None,
    number: int = 0,
    seed: int = 0,
    width: int = 0,
) -> Any:
    """What `objective` makes of utterances in these places (by default 0, 1, …) of micro-batch `number`."""
    targets = targets if targets is not None else [None] * len(waveforms)
    places = places if places is not None else range(len(waveforms))
    utterances = [Utterance(*each) for each in zip(waveforms, targets, places, strict=True)]
    return objective.make_inputs(utterances, rng=lambda place: generator(seed, Stream.MASK, number, place), width=width)


def same_inputs(one: Any, other: Any) -> bool:
    """Whether inputs are of the same type and bitwise equal."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same_inputs, one, other))
    return bool(one == other)


def same(one: MicroBatch, other: MicroBatch) -> bool:
    """Whether micro-batches are bitwise equal."""
    plain = [dataclasses.replace(batch, inputs=None) for batch in (one, other)]  # type: ignore[arg-type]
    return plain[0] == plain[1] and same_inputs(one.inputs, other.inputs)


def utterance_of_masked_frames(inputs: Any) -> torch.Tensor:
    """The utterance of each masked frame [M] of `ContrastiveInputs`."""
    return torch.repeat_interleave(inputs.masked_B)
