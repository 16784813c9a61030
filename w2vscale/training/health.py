"""Is a run healthy? Finds trouble in its log lines: pure functions, which compare each line with those before it.

Every objective can have spikes of the loss and exploding gradient norms. What else can go wrong, and how that looks in
the metrics, the objective says itself (`Objective.findings`). docs/health.md explains each kind of trouble.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from w2vscale.config import Config, HealthConfig
from w2vscale.objectives import Objective
from w2vscale.objectives.base import Finding

RECENT = 20
"""Log lines of which running medians are taken. Those with a spike or an exploding norm are not among them."""

ENOUGH = 5
"""Log lines without which there is no running median."""

SCATTER = 8.0
"""A spike is also this many median absolute deviations above the running median: losses of small updates are noisy."""


@dataclass(frozen=True)
class Trouble:
    """A finding of the newest log line, and how long it has lasted."""

    finding: Finding
    since: int  # update of the last log line without it; 0 if there is none
    lines: int  # log lines in a row that count; 0 while it is normal

    def __str__(self) -> str:
        return f"trouble since update {self.since}: {self.finding.text}"


@dataclass(frozen=True)
class History:
    """What a run's log lines up to `update` say about the next one."""

    update: int = 0
    phase: int = 0
    losses: tuple[float, ...] = ()  # the newest of this phase
    norms: tuple[float, ...] = ()  # of the gradient
    troubles: Mapping[str, Trouble] = field(default_factory=dict)  # by kind

    def new_since(self, earlier: History) -> list[Finding]:
        """Return the findings that count now and did not at an earlier line."""
        old = {kind for kind, trouble in earlier.troubles.items() if trouble.lines}
        return [trouble.finding for kind, trouble in self.troubles.items() if trouble.lines and kind not in old]

    def lasting(self, patience: int) -> Trouble | None:
        """Return the trouble that has lasted for `patience` log lines, if any; the one that began first."""
        found = [trouble for trouble in self.troubles.values() if trouble.lines >= patience]
        return min(found, key=lambda trouble: trouble.since, default=None)


def examine(
    history: History, update: int, metrics: Mapping[str, float], *, config: Config, objective: Objective
) -> History:
    """Return the history with the log line of `update`. A line without a finite loss changes nothing."""
    loss, norm, limits = metrics["loss"], metrics["grad_norm"], config.health
    if not math.isfinite(loss):
        return history
    if (phase := objective.phase(update - 1)) != history.phase:
        history = History(history.update, phase, troubles=history.troubles)
    spike = loss_spike(loss, history.losses, limits, lasting="spike" in history.troubles)
    explosion = None
    if len(history.losses) >= ENOUGH and loss >= median(history.losses):
        explosion = norm_explosion(norm, history.norms, limits, lasting="norm" in history.troubles)
    found = [finding for finding in (spike, explosion) if finding is not None]
    troubles: dict[str, Trouble] = {}
    for finding in [*found, *objective.findings(metrics, limits)]:
        before = history.troubles.get(finding.kind, Trouble(finding, history.update, 0))
        counts = finding.kind != "chance" or update >= chance_counts_from(config, objective)
        troubles[finding.kind] = Trouble(finding, before.since, before.lines + counts)
    return History(
        update,
        phase,
        history.losses if spike else (*history.losses, loss)[-RECENT:],
        history.norms if explosion or not math.isfinite(norm) else (*history.norms, norm)[-RECENT:],
        troubles,
    )


def examine_all(lines: Iterable[Mapping[str, Any]], *, config: Config, objective: Objective) -> History:
    """Return the history after log lines from a metrics.jsonl, for a run that continues. What a line lacks is NaN."""
    history = History()
    for line in lines:
        metrics = defaultdict(lambda: math.nan, {key: value for key, value in line.items() if value is not None})
        history = examine(history, line["update"], metrics, config=config, objective=objective)
    return history


def loss_spike(loss: float, recent: tuple[float, ...], limits: HealthConfig, *, lasting: bool) -> Finding | None:
    """Compare a loss with recent ones. A spike is `lasting` until the loss is half-way down from the limit."""
    if len(recent) < ENOUGH:
        return None
    usual = median(recent)
    scatter = median(abs(one - usual) for one in recent)
    allowed = max((limits.loss_ratio - 1.0) * abs(usual), SCATTER * scatter)
    if loss - usual <= (allowed / 2 if lasting else allowed):
        return None
    return Finding(
        "spike",
        f"the loss spikes: it is {loss:.4g}, and its running median {usual:.4g} (health.loss_ratio="
        f"{limits.loss_ratio:g}); if it does not come down again, lower optim.lr",
    )


def norm_explosion(norm: float, recent: tuple[float, ...], limits: HealthConfig, *, lasting: bool) -> Finding | None:
    """Compare the gradient norm of a log line whose loss does not fall with recent ones.

    It also grows when a model leaves the plateau at chance, and then the loss falls. An explosion is `lasting` until
    the norm is below half of the limit.
    """
    if len(recent) < ENOUGH:
        return None
    usual = median(recent)
    if not norm > usual * (limits.norm_ratio / 2 if lasting else limits.norm_ratio):
        return None
    return Finding(
        "norm",
        f"the gradient norm explodes: it is {norm:.3g}, and its running median {usual:.3g} (health.norm_ratio="
        f"{limits.norm_ratio:g}), while the loss does not fall; if it stays there, lower optim.lr or lengthen "
        "schedule.warmup_updates",
    )


def chance_counts_from(config: Config, objective: Objective) -> int:
    """Return the update from which a model should be better than chance."""
    return max(round(config.health.chance_after * config.trainer.updates), objective.updates_at_chance)
