"""`batch.concat=auto`: measure how many micro-batches fit into one forward on this GPU.

Runs before the first update. The result is stored in the folder of the run and reused when the run resumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from w2vscale.config import BatchConfig
from w2vscale.data.loading import TrainingData
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.plan import run_length
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
    """Return how many micro-batches share a forward, as `batch.concat` asks. Collective.

    With auto, a GPU run reads the stored calibration if device, data and settings are unchanged, and measures
    otherwise.
    """
    batch = run.config.batch
    measure = partial(
        forward_size, batch, run.engine, run.objective, run.training_set,
        world_size=run.ranks.world_size, device=run.device, log=log,
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
    return found


def forward_size(
    batch: BatchConfig, engine: Engine, objective: Objective, training_set: TrainingData, *,
    world_size: int, device: torch.device, log: Callable[[str], None],
) -> int:  # fmt: skip
    """Return `batch.concat`, or the micro-batches of a rank if they are fewer. With auto, measure. Collective.

    On a GPU, it is the largest divisor of the run length that fits into memory on every rank. On a CPU it is 1, because
    longer forwards are not faster. The model does not change, because all optimizer steps are skipped.
    """
    per_rank = batch.micro_batches // world_size
    if batch.concat != "auto":
        return min(batch.concat, per_rank)
    length = run_length(training_set.series_length, per_rank=per_rank)
    if device.type != "cuda" or length == 1:
        return 1
    log("batch.concat=auto: measuring how many micro-batches fit into one forward; the model does not change")
    sizes = [size for size in range(1, length + 1) if length % size == 0]
    with engine.buffers.unchanged():
        return min(
            _largest_fitting(partial(_take, engine, objective, example, per_rank=per_rank), sizes, device)
            for example in training_set.examples()
        )


def _largest_fitting(take: Callable[[int], None], sizes: Sequence[int], device: torch.device) -> int:
    """Return the largest of `sizes` (ascending, from 1) whose copies of a micro-batch fit into one forward. Collective.

    `take` runs a number of copies. Before each size is run, its memory is predicted from the two before it.
    """
    limit = SHARE * memory_limit(device)
    take(1)  # warm-up: makes the allocations that happen only once
    measured = [(0, peak_memory(device, lambda: None)), (1, peak_memory(device, partial(take, 1)))]
    for size in sizes[1:]:
        (before, least), (last, most) = measured[-2:]
        predicted = most + (most - least) * (size - last) / (last - before)
        if _above(predicted, limit):
            break
        measured.append((size, peak_memory(device, partial(take, size))))
        if _above(measured[-1][1], limit):
            return last
    return measured[-1][0]


def _above(needed: float, limit: float) -> bool:
    """Whether the memory that is needed is above the limit on any rank. Collective."""
    return largest_over_ranks([needed - limit])[0] > 0


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
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
