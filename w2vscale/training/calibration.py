"""`batch.concat=auto`: measure how much audio fits into one forward on this GPU.

Runs before the first update. The result is stored in the folder of the run and reused when the run resumes.
"""

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

SHARE = 0.9  # of GPU memory to use; the rest is a margin for fragmentation and variation between batches
FILE = "calibration.json"


def grouping_of(run: Run, log: Callable[[str], None]) -> Grouping:
    """Return the grouping that `batch.concat` asks for. Collective.

    With auto, a GPU run reads the stored calibration if device and settings are unchanged, and measures otherwise.
    On a CPU, auto means 1.
    """
    concat = run.config.batch.concat
    if concat != "auto":
        return FixedGrouping(concat)
    if run.device.type != "cuda":
        log("batch.concat=auto: using 1, because larger forwards are not faster on a CPU")
        return FixedGrouping(1)
    path, conditions = run.exp / FILE, _conditions(run)
    found: tuple[Capacity, ...] | None = broadcast_from_main(_read(path, conditions) if run.ranks.is_main else None)
    if found is None:
        log("batch.concat=auto: measuring how much fits into one forward (its optimizer steps are skipped)")
        with run.engine.buffers.unchanged():
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
    """Return how many padded samples fit into one forward of micro-batches like `example`; equal on all ranks.

    Measures the memory of one and of two copies, and assumes that each further copy takes as much as the second.
    """
    limit = SHARE * memory_limit(run.device)
    most = run.config.batch.micro_batches // run.ranks.world_size
    take = partial(_take, run, example, most=most)
    fitting = 1
    if most > 1:
        take(joined=1)  # warm-up: makes the allocations that happen only once
        none = peak_memory(run.device, lambda: None)
        one = peak_memory(run.device, partial(take, joined=1))
        if largest_over_ranks([2 * one - none - limit])[0] <= 0:  # two copies fit on every rank
            two = peak_memory(run.device, partial(take, joined=2))
            fitting = min(1 + max(int(limit) - one, 0) // max(two - one, 1), most)
    width = example.inputs.audio.waveforms_BS.shape[1]
    fewest, samples, width = map(int, largest_over_ranks([-fitting, example.padded_samples, width]))
    return Capacity(width, -fewest * samples)


def _take(run: Run, example: MicroBatch, *, joined: int, most: int) -> None:
    """Run a forward and backward of `joined` copies, and, if `most` allows, a second one while gradients exist.

    The NaN denominator makes the gradient NaN, so that every engine skips the step.
    """
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
    """Read the stored calibration; None if there is none or it was measured under other conditions."""
    try:
        document = json.loads(path.read_text())
        if document["conditions"] != conditions:
            return None
        return tuple(Capacity(one["width"], one["samples"]) for one in document["capacities"]) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None
