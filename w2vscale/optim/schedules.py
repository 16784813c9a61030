"""Learning-rate schedules as pure functions of the update number."""

from __future__ import annotations

import math

from w2vscale.config import OptimConfig, ScheduleConfig


def learning_rate(update: int, *, optim: OptimConfig, schedule: ScheduleConfig, updates: int) -> float:
    """Return the learning rate of update `update` (0-based) of `updates`; the peak is `optim.lr`.

    cosine, linear: linear warm-up that reaches the peak at the last of `warmup_updates`, then decay to `final_ratio`
    times the peak at the last update (cosine: Loshchilov & Hutter 2017; a floor of 10 % as in GPT-3).
    tri_stage: linear warm-up from `initial_ratio` times the peak, a constant stage, then exponential decay to
    `final_ratio` times the peak at the last update (Park et al. 2019). `stages` gives the fractions of `updates`.
    """
    if schedule.kind == "tri_stage":
        return optim.lr * _tri_stage(update, schedule, updates)
    warmup = schedule.warmup_updates
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    progress = min((update - warmup + 1) / max(updates - warmup, 1), 1.0)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return optim.lr * (schedule.final_ratio + (1.0 - schedule.final_ratio) * shape)


def _tri_stage(update: int, schedule: ScheduleConfig, updates: int) -> float:
    warmup, constant, decay = (share * updates for share in schedule.stages)
    if update < warmup:
        return schedule.initial_ratio + (1.0 - schedule.initial_ratio) * update / warmup
    if update < warmup + constant or decay == 0.0:
        return 1.0
    progress = min((update - warmup - constant + 1) / decay, 1.0)
    return math.exp(progress * math.log(schedule.final_ratio))
