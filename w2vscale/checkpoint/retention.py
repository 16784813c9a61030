"""Which checkpoints of a run are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The settings `checkpoint.*` of the same names, and `trainer.best_metric`."""

    keep_last: int = 1
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = "loss"

    def unneeded(self, validations: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The updates, in order, whose checkpoints need not be kept, of those with these metrics of a validation.

        Those with a loss alone, which were kept before `best_metric` was changed, come after those that have the
        metric.
        """
        updates = sorted(validations)
        best: dict[int, None] = {}
        for metric in (self.best_metric, "loss"):
            ranked = [update for update in updates if metric in validations[update]]
            best |= dict.fromkeys(sorted(ranked, key=lambda update: validations[update][metric]))
        kept = {*updates[-self.keep_last :], *list(best)[: self.keep_best]}
        return [
            update
            for update in updates
            if update not in kept and not (self.keep_every and update % self.keep_every == 0)
        ]
