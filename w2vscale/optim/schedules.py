"""Learning-rate schedules as pure functions of the update number."""

from __future__ import annotations

import math

from w2vscale.config import OptimConfig, ScheduleConfig


def learning_rate(update: int, *, optim: OptimConfig, schedule: ScheduleConfig, updates: int) -> float:
    """Return the learning rate of update `update` (0-based) of `updates`; the peak is `optim.lr`.

    cosine, linear: linear warm-up over `warmup_updates`, then decay to `final_ratio` times the peak (cosine: Loshchilov
    & Hutter 2017; a floor of 10 % as in GPT-3). With `first_step=1` the last update of the warm-up has the peak and the
    last of all the final rate; with 0 the update after each has it, as in fairseq's `polynomial_decay`.
    tri_stage: linear warm-up from `initial_ratio` times the peak, a constant stage, then exponential decay to
    `final_ratio` times the peak after the last update (Park et al. 2019, as in fairseq). `stages` gives the fractions
    of `updates`.
    """
    if schedule.kind == "tri_stage":
        return optim.lr * _tri_stage(update, schedule, updates)
    step, warmup = update + schedule.first_step, schedule.warmup_updates
    if step < warmup:
        return optim.lr * step / warmup
    progress = min((step - warmup) / max(updates - warmup, 1), 1.0)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return optim.lr * (schedule.end + (1.0 - schedule.end) * shape)


def _tri_stage(update: int, schedule: ScheduleConfig, updates: int) -> float:
    warmup, constant, decay = (share * updates for share in schedule.stages)
    if update < warmup:
        return schedule.initial_ratio + (1.0 - schedule.initial_ratio) * update / warmup
    if update < warmup + constant or decay == 0.0:
        return 1.0
    progress = min((update - warmup - constant) / decay, 1.0)
    return math.exp(progress * math.log(schedule.end))
