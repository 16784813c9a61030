"""How much audio a run sees, and whether that is a sensible number of epochs."""

from __future__ import annotations

from dataclasses import dataclass

from w2vscale.config import BatchConfig, Config
from w2vscale.objectives import Objective
from w2vscale.planning.work import FILLED

FEWEST_EPOCHS = 0.5
"""A run that sees less than this of its corpus looks like a mistake."""


@dataclass(frozen=True)
class Corpus:
    """What one epoch of `data.train` has."""

    hours: float
    micro_batches: int

    def filled(self, batch: BatchConfig) -> float:
        """Seconds of audio of a micro-batch, of those that it may have."""
        return self.hours * 3600 / (self.micro_batches * batch.max_seconds)


@dataclass(frozen=True)
class Exposure:
    """The audio of a run."""

    updates: int
    hours_per_update: float
    epochs: float | None  # None: the corpus is not known

    @property
    def hours(self) -> float:
        """Hours seen in all."""
        return self.updates * self.hours_per_update


def exposure(config: Config, corpus: Corpus | None) -> Exposure:
    """Return the audio of a run. Without a corpus, micro-batches are as full as those of a typical one."""
    updates, batch = config.trainer.updates, config.batch
    if corpus is None:
        return Exposure(updates, FILLED * batch.max_seconds * batch.micro_batches / 3600, None)
    per_update = batch.micro_batches / corpus.micro_batches
    return Exposure(updates, corpus.hours * per_update, updates * per_update)


def unusual_epochs(config: Config, objective: Objective, corpus: Corpus) -> str | None:
    """Return a line on a number of epochs that looks like a mistake, with what to set instead; None if it does not."""
    seen = exposure(config, corpus)
    assert seen.epochs is not None
    of_what = f"of data.train ({_hours(corpus.hours)} hours per epoch, {_hours(seen.hours_per_update)} per update)"
    updates = f"trainer.updates={seen.updates} amounts to"
    if seen.epochs < FEWEST_EPOCHS:
        whole = _rounded(seen.updates / seen.epochs)
        return f"{updates} {seen.epochs:.0%} of an epoch {of_what}: to see all of it, set trainer.updates={whole}"
    if seen.epochs <= objective.most_epochs:
        return None
    fewer = objective.most_epochs // 10
    wanted = max(_rounded(seen.updates * fewer / seen.epochs), 1)
    schedule, also = config.schedule, ""
    if schedule.kind != "tri_stage" and schedule.warmup_updates > wanted:
        also = f" schedule.warmup_updates={max(_rounded(wanted * schedule.warmup_updates / seen.updates), 1)}"
    return f"{updates} {seen.epochs:,.0f} epochs {of_what}: for {fewer:,} epochs set trainer.updates={wanted}{also}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def _rounded(updates: float) -> int:
    """Two digits, rounded up."""
    unit = 10 ** max(len(str(int(updates))) - 2, 0)
    return -int(-updates // unit) * unit
