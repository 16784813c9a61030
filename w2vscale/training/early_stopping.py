"""Early stopping: a run ends when its validations do not improve any more.

The best validation is part of the state in a checkpoint. So a resume, a roll back or another engine changes nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

from w2vscale.checkpoint.format import BestValidation, TrainState, folder_name
from w2vscale.config import Config
from w2vscale.errors import counted


def best_validation(before: BestValidation | None, metric: str, value: float, update: int) -> BestValidation:
    """Return the best validation after one more at `update`. Lower is better; NaN or infinity is no improvement."""
    if before is None or before.metric != metric:
        before = BestValidation(metric)
    if math.isfinite(value) and (before.value is None or value < before.value):
        return BestValidation(metric, value, update)
    return BestValidation(metric, before.value, before.update, before.since + 1)


def stopped_early(config: Config, state: TrainState) -> bool:
    """Whether a run ends at `state`, before `trainer.updates`, because its validations do not improve any more."""
    patience, best = config.trainer.early_stopping, state.best
    if not patience or best is None or best.metric != config.trainer.best_metric:
        return False
    return best.since >= patience and state.update < config.trainer.updates


def describe_end(state: TrainState, config: Config, exp: Path) -> str:
    """Say why a run has `stopped_early`, and which checkpoint is the best."""
    best = state.best
    assert best is not None, "stopped early"
    if best.value is None:
        why = f"{counted(best.since, 'validation')} had no finite {best.metric}"
    else:
        checkpoint = exp / "checkpoints" / folder_name(best.update)
        why = (
            f"{counted(best.since, 'validation')} without a {best.metric} below {best.value:.4g}, that of update "
            f"{best.update}. "
        )
        why += (
            f"{checkpoint} is the best; commands use the newest unless they name it"
            if checkpoint.is_dir()
            else "It was not kept (keep_best)"
        )
    return (
        f"stopped early at update {state.update} (trainer.early_stopping={config.trainer.early_stopping}): {why}. "
        "A higher trainer.early_stopping continues"
    )
