"""`batch.concat=auto`: measure how many micro-batches fit into one forward on this GPU.

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

from w2vscale.config import BatchConfig
from w2vscale.data.loading import TrainingData
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.plan import largest_divisor, run_length
from w2vscale.distributed.process_group import broadcast_from_main, largest_over_ranks
from w2vscale.engine import Engine
from w2vscale.engine.memory import memory_limit, peak_memory
from w2vscale.errors import UserError
from w2vscale.files import write_text
from w2vscale.objectives import Objective, StepContext
from w2vscale.training.run import Run

SHARE = 0.9  # of GPU memory to use; the rest is a margin for fragmentation and variation between batches
FILE = "calibration.json"


def micro_batches_per_forward(run: Run, log: Callable[[str], None]) -> int:
    """Return the number that `batch.concat` asks for. Collective.

    With auto, a GPU run reads the stored calibration if device, data and settings are unchanged, and measures
    otherwise.
    """
    batch = run.config.batch
    measure = partial(
        forward_size, batch, run.engine, run.objective, run.training_set,
        world_size=run.ranks.world_size, device=run.device,
    )  # fmt: skip
    if batch.concat != "auto" or run.device.type != "cuda":
        return measure()
    path, conditions = run.exp / FILE, _conditions(run)
    found: int | None = broadcast_from_main(_read(path, conditions) if run.ranks.is_main else None)
    if found is None:
        found = measure()
        if run.ranks.is_main:
            document = {"conditions": conditions, "micro_batches_per_forward": found}
            try:
                write_text(path, json.dumps(document, indent=2) + "\n")
            except UserError as error:
                log(f"warning: {error}; a resumed run will measure again")
    counted = "1 micro-batch" if found == 1 else f"{found} micro-batches"
    log(f"batch.concat=auto: {counted} (up to {found * batch.max_seconds:g} s of audio) per forward")
    return found


def forward_size(
    batch: BatchConfig, engine: Engine, objective: Objective, training_set: TrainingData, *,
    world_size: int, device: torch.device,
) -> int:  # fmt: skip
    """Return `batch.concat`. With auto, measure how many micro-batches share a forward. Collective.

    On a GPU, it is the largest divisor of the run length that fits into memory on every rank. On a CPU it is 1, because
    longer forwards are not faster. The model does not change, because all optimizer steps are skipped.
    """
    if batch.concat != "auto":
        return batch.concat
    per_rank = batch.micro_batches // world_size
    length = run_length(training_set.series_length, per_rank=per_rank)
    if device.type != "cuda" or length == 1:
        return 1
    with engine.buffers.unchanged():
        fitting = [
            _fitting(partial(_take, engine, objective, example, per_rank=per_rank), device)
            for example in training_set.examples()
        ]
    (fewest,) = largest_over_ranks([-min(fitting)])
    return largest_divisor(length, at_most=-int(fewest))


def _fitting(take: Callable[[int], None], device: torch.device) -> int:
    """Return how many copies of a micro-batch fit into one forward. `take` runs a number of copies. Collective.

    Measures the memory of one and of two copies, and assumes that each further copy takes as much as the second.
    """
    limit = SHARE * memory_limit(device)
    take(1)  # warm-up: makes the allocations that happen only once
    none = peak_memory(device, lambda: None)
    one = peak_memory(device, partial(take, 1))
    if largest_over_ranks([2 * one - none - limit])[0] > 0:  # two copies may not fit on every rank
        return 1
    two = peak_memory(device, partial(take, 2))
    return 1 + max(int(limit) - one, 0) // max(two - one, 1)


def _take(engine: Engine, objective: Objective, example: MicroBatch, copies: int, *, per_rank: int) -> None:
    """Run a forward and backward of some copies, and, if `per_rank` allows, a second one while gradients exist.

    The NaN denominator makes the gradient NaN, so that every engine skips the step.
    """
    engine.run_window(
        [example] * min(2 * copies, per_rank), objective, StepContext(0, 0, worst_case=True),
        per_forward=copies, denominator=torch.tensor(math.nan),
    )  # fmt: skip
    engine.step(lr=0.0, max_norm=1.0)


def _conditions(run: Run) -> dict[str, Any]:
    sections = {"model", "regularization", "objective", "data", "batch", "engine", "precision"}
    return {
        "device": torch.cuda.get_device_name(run.device),
        "memory": torch.cuda.get_device_properties(run.device).total_memory,
        "processes": run.ranks.world_size,
        "training set": run.training_set.describe(),
        "settings": run.config.model_dump(mode="json", include=sections),
    }


def _read(path: Path, conditions: dict[str, Any]) -> int | None:
    """Read the stored calibration; None if there is none or it was measured under other conditions."""
    try:
        document = json.loads(path.read_text())
        return int(document["micro_batches_per_forward"]) if document["conditions"] == conditions else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
