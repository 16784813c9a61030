"""How much audio fits into one forward: measured before a run's first update, and kept in its folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import broadcast_from_main, largest_over_ranks
from w2vscale.engine import Engine
from w2vscale.engine.joining import Capacity, FittingJoining, FixedJoining
from w2vscale.engine.memory import memory_limit, peak_memory, total_memory
from w2vscale.objectives.objective import build_objective, with_every_layer
from w2vscale.training.run import Run

SHARE = 0.9
"""Of the memory that there is; the rest is for its fragments and for what varies."""

FILE = "calibration.json"


def calibrate(run: Run, log: Callable[[str], None]) -> None:
    """Have the engine join what fits: as measured for this run under the same conditions, or measured now. Collective.

    Raises:
        UserError: the system does not tell how much memory is used.
    """
    config, engine = run.config, run.engine
    path, conditions = run.exp / FILE, _conditions(run)
    found: tuple[Capacity, ...] | None = broadcast_from_main(_read(path, conditions) if run.ranks.is_main else None)
    if found is None:
        log("batch.concat=auto: measuring how much fits into one forward (in steps that are skipped on purpose)")
        criterion, engine.criterion = engine.criterion, build_objective(with_every_layer(config)).criterion
        found = tuple(_capacity(run, example) for example in run.training_set.examples())
        engine.criterion = criterion
        if run.ranks.is_main:
            document = {"conditions": conditions, "capacities": [capacity._asdict() for capacity in found]}
            try:
                path.write_text(json.dumps(document, indent=2) + "\n")
            except OSError as error:
                log(f"warning: {path}: cannot be written ({error.strerror}); a continued run will measure again")
    engine.joining = FittingJoining(found)
    rate = config.model.sampling_rate
    told = ", ".join(f"{one.samples / rate:.0f} s (utterances of {one.width / rate:.1f} s)" for one in found)
    log(f"batch.concat=auto: padded audio of one forward, at most: {told}")


def _capacity(run: Run, example: MicroBatch) -> Capacity:
    """From the memory that one and two of `example` take; every further one takes as much as the second, and that no
    more than the first. The same on all ranks, also where one of them could not read an utterance."""
    limit = SHARE * memory_limit(run.device, processes=int(os.environ.get("LOCAL_WORLD_SIZE", run.ranks.world_size)))
    most = run.config.batch.micro_batches // run.ranks.world_size
    take = partial(_take, run.engine, example, most=most)
    fitting = 1
    if most > 1:
        take(joined=1)  # what is allocated once
        none = peak_memory(run.device, lambda: None)
        one = peak_memory(run.device, partial(take, joined=1))
        if largest_over_ranks([2 * one - none - limit])[0] <= 0:  # there is room for two, on every rank
            two = peak_memory(run.device, partial(take, joined=2))
            fitting = min(1 + max(int(limit) - one, 0) // max(two - one, 1), most)
    fewest, samples, width = largest_over_ranks(
        [-fitting, example.padded_samples, example.inputs.waveforms_BS.shape[1]]
    )
    return Capacity(int(width), int(-fewest * samples))


def _take(engine: Engine, example: MicroBatch, *, joined: int, most: int) -> None:
    """A forward and backward, and another beside the gradients of the first where a window has as `most` so many. The
    denominator makes the gradient no number: the step is skipped, on any engine."""
    engine.joining = FixedJoining(joined)
    engine.run_window([example] * min(2 * joined, most), torch.tensor(math.nan))
    engine.step(lr=0.0, max_norm=1.0)


def _conditions(run: Run) -> dict[str, Any]:
    name, memory = "cpu", total_memory(run.device)
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name(run.device)
    settings = run.config.model_dump(mode="json", include={"model", "ctc", "data", "batch", "engine", "precision"})
    return {"device": name, "memory": memory, "processes": run.ranks.world_size, "settings": settings}


def _read(path: Path, conditions: dict[str, Any]) -> tuple[Capacity, ...] | None:
    """What an earlier calibration found; None if there was none, or under other conditions."""
    try:
        document = json.loads(path.read_text())
        if document["conditions"] != conditions:
            return None
        return tuple(Capacity(one["width"], one["samples"]) for one in document["capacities"]) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None
