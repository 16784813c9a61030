"""How much audio fits into one forward on a GPU: measured before the first update of a run, and kept in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import broadcast_from_main, largest_over_ranks
from w2vscale.engine.accumulation import Capacity, FittingGrouping, FixedGrouping, Grouping
from w2vscale.engine.memory import memory_limit, peak_memory
from w2vscale.errors import UserError
from w2vscale.files import write_text
from w2vscale.objectives import StepContext
from w2vscale.training.run import Run

SHARE = 0.9
"""Share of the memory that is used; the rest is for fragmentation and for what varies."""

FILE = "calibration.json"


def grouping_of(run: Run, log: Callable[[str], None]) -> Grouping:
    """What `batch.concat` asks for. Collective.

    auto: on a GPU, as measured for this run under the same conditions, or measured now; 1 on a CPU.
    """
    concat = run.config.batch.concat
    if concat != "auto":
        return FixedGrouping(concat)
    if run.device.type != "cuda":
        log("batch.concat=auto: 1 on a CPU, where longer forwards are not faster")
        return FixedGrouping(1)
    path, conditions = run.exp / FILE, _conditions(run)
    found: tuple[Capacity, ...] | None = broadcast_from_main(_read(path, conditions) if run.ranks.is_main else None)
    if found is None:
        log("batch.concat=auto: measuring how much fits into one forward (in steps that are skipped on purpose)")
        found = tuple(_capacity(run, example) for example in run.training_set.examples())
        if run.ranks.is_main:
            document = {"conditions": conditions, "capacities": [capacity._asdict() for capacity in found]}
            try:
                write_text(path, json.dumps(document, indent=2) + "\n")
            except UserError as error:
                log(f"warning: {error}; a resumed run will measure again")
    rate = run.config.model.sampling_rate
    listed = ", ".join(f"{one.samples / rate:.0f} s (utterances of {one.width / rate:.1f} s)" for one in found)
    log(f"batch.concat=auto: largest forwards in padded audio: {listed}")
    return FittingGrouping(found)


def _capacity(run: Run, example: MicroBatch) -> Capacity:
    """Extrapolates from the memory that one and two of `example` take: every further one takes as much as the second.
    The same on all ranks, also where one of them could not read an utterance."""
    limit = SHARE * memory_limit(run.device)
    most = run.config.batch.micro_batches // run.ranks.world_size
    take = partial(_take, run, example, most=most)
    fitting = 1
    if most > 1:
        take(joined=1)  # allocates what is allocated once
        none = peak_memory(run.device, lambda: None)
        one = peak_memory(run.device, partial(take, joined=1))
        if largest_over_ranks([2 * one - none - limit])[0] <= 0:  # two fit on every rank
            two = peak_memory(run.device, partial(take, joined=2))
            fitting = min(1 + max(int(limit) - one, 0) // max(two - one, 1), most)
    width = example.inputs.audio.waveforms_BS.shape[1]
    fewest, samples, width = map(int, largest_over_ranks([-fitting, example.padded_samples, width]))
    return Capacity(width, -fewest * samples)


def _take(run: Run, example: MicroBatch, *, joined: int, most: int) -> None:
    """A forward and backward with `joined` micro-batches, and a second one beside its gradients where `most` allows it.
    The denominator makes the gradient NaN, so that any engine skips the step."""
    step = StepContext(run.config.trainer.seed, 0, worst_case=True)
    run.engine.run_window(
        [example] * min(2 * joined, most), run.objective, step,
        grouping=FixedGrouping(joined), denominator=torch.tensor(math.nan),
    )  # fmt: skip
    run.engine.step(lr=0.0, max_norm=1.0)


def _conditions(run: Run) -> dict[str, Any]:
    sections = {"model", "regularization", "objective", "data", "batch", "engine", "precision"}
    return {
        "device": torch.cuda.get_device_name(run.device),
        "memory": torch.cuda.get_device_properties(run.device).total_memory,
        "processes": run.ranks.world_size,
        "settings": run.config.model_dump(mode="json", include=sections),
    }


def _read(path: Path, conditions: dict[str, Any]) -> tuple[Capacity, ...] | None:
    """What an earlier calibration found; None if there was none, or under other conditions."""
    try:
        document = json.loads(path.read_text())
        if document["conditions"] != conditions:
            return None
        return tuple(Capacity(one["width"], one["samples"]) for one in document["capacities"]) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None
