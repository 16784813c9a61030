"""Early stopping: a run ends when its validations do not improve any more.

The decision follows from the lines of metrics.jsonl up to the update. A run that continues deletes later lines first,
and they are uploaded with its checkpoints: so it is the same after a resume or a roll back, on any engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2vscale.checkpoint.format import folder_name
from w2vscale.config import Config
from w2vscale.errors import counted
from w2vscale.files import read_metrics

if TYPE_CHECKING:
    from w2vscale.distributed.ranks import Ranks


@dataclass(frozen=True)
class Progress:
    """The best validation of a run, and what came after it."""

    metric: str
    best: float | None = None  # None: no validation has had a finite value
    update: int = 0  # of the best one
    since: int = 0  # validations after it, none of which was better


def progress(validations: Iterable[Mapping[str, Any]], metric: str) -> Progress:
    """Return the progress after validations from a metrics.jsonl. Lower is better; no value is no improvement."""
    found = Progress(metric)
    for line in validations:
        value = line.get(metric)
        if value is not None and (found.best is None or value < found.best):
            found = Progress(metric, value, line["update"])
        else:
            found = Progress(metric, found.best, found.update, found.since + 1)
    return found


def stopped_early(config: Config, exp: Path, update: int) -> Progress | None:
    """Return the progress because of which the run ends at `update`, or None if it goes on.

    Raises UserError if metrics.jsonl cannot be read.
    """
    patience, file = config.trainer.early_stopping, exp / "metrics.jsonl"
    if not patience or update >= config.trainer.updates or not file.is_file():
        return None
    lines = read_metrics(file, "validation")
    found = progress((line for line in lines if line["update"] <= update), config.trainer.best_metric)
    return found if found.since >= patience else None


def early_end(config: Config, exp: Path, ranks: Ranks, update: int) -> Progress | None:
    """Return what `stopped_early` does, on all ranks. Collective.

    Rank 0 decides for all: it alone has metrics.jsonl. Raises UserError on all ranks if it cannot be read.
    """
    from w2vscale.distributed.process_group import broadcast_from_main, errors_on_all_ranks

    if not config.trainer.early_stopping or update >= config.trainer.updates:
        return None
    with errors_on_all_ranks():
        found = stopped_early(config, exp, update) if ranks.is_main else None
    ended: Progress | None = broadcast_from_main(found)
    return ended


def describe_end(found: Progress, update: int, config: Config, exp: Path) -> str:
    """Say why a run has ended at `update`, and which checkpoint is the best."""
    if found.best is None:
        why = f"{counted(found.since, 'validation')} had no finite {found.metric}"
    else:
        checkpoint = exp / "checkpoints" / folder_name(found.update)
        kept = checkpoint.is_dir()
        why = (
            f"{counted(found.since, 'validation')} without a {found.metric} below {found.best:.4g}, that of update "
            f"{found.update}; "
            + (f"{checkpoint} is the best" if kept else "its checkpoint was not kept (checkpoint.keep_best)")
        )
    return (
        f"stopped early at update {update} (trainer.early_stopping={config.trainer.early_stopping}): {why}; "
        "a higher value continues"
    )
