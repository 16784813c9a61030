"""Training a run from its settings: open everything that it needs, run its loop, and close everything."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

from w2vscale.config import Config
from w2vscale.data.loading import loader_processes
from w2vscale.distributed.process_group import TIMEOUT, Patience, process_group
from w2vscale.engine.memory import explain_oom
from w2vscale.runtime import StopRequest
from w2vscale.training.calibration import micro_batches_per_forward
from w2vscale.training.callbacks import Callbacks
from w2vscale.training.display import Display, Verbosity
from w2vscale.training.early_stopping import stopped_early
from w2vscale.training.exclusive import locked_by_main, mirrored_by_main
from w2vscale.training.folder import make_folder
from w2vscale.training.loop import Trainer
from w2vscale.training.run import build_run
from w2vscale.training.run_log import RunLog
from w2vscale.training.summary import describe_start
from w2vscale.training.time_limit import TimeLimit
from w2vscale.training.watchdog import SLOW, Watchdog


def train(
    config: Config,
    exp: Path,
    *,
    resume: str = "auto",
    command: Sequence[str] | None = None,
    stop: StopRequest | None = None,
    verbosity: Verbosity = "normal",
    callbacks: Callbacks = Callbacks(),  # noqa: B008 - it cannot change
    around_updates: Callable[[], AbstractContextManager[None]] = nullcontext,
    began: float | None = None,
) -> int:
    """Train up to `trainer.updates`, on all ranks. Return 0, or 128 + the number of the signal that stopped the run.

    Return 75 if `trainer.max_hours` are over, or the run is complete, but the last checkpoint could not be uploaded to
    `checkpoint.store`; the same command continues or uploads it. `exp` is the folder of the run; for `resume` see
    `build_run`; `command` are arguments of `w2vscale` to write into run.sh. `stop` is checked in every update.
    `around_updates` makes a context that is entered after everything is built and exited after the last update. The
    time of `trainer.max_hours` is counted since `began`, by `time.monotonic`; by default now. Raises UserError if a
    setting, a file or the environment is wrong, or another run uses the folder; existing checkpoints are not changed.
    The process must be prepared first: see `runtime.training`.
    """
    stop = stop or StopRequest()
    limit = TimeLimit(config.trainer.max_hours, grace=config.checkpoint.grace_seconds, began=began)
    # Ranks wait for each other as long as the watchdog lets the slowest one take.
    timeout = max(TIMEOUT, timedelta(seconds=SLOW * config.watchdog.seconds + 60))
    with process_group(needed=config.engine.name != "ddp", timeout=timeout) as (ranks, device):
        run_log = RunLog(exp, ranks)
        display = Display(
            total=config.trainer.updates, enabled=ranks.is_main, verbosity=verbosity, run_log=run_log, stop=stop
        )
        seconds, grace = config.watchdog.seconds, config.checkpoint.grace_seconds
        watchdog = Watchdog(ranks, exp / "logs", seconds=seconds, stop=stop, grace=grace, log=run_log.line)
        patience = Patience(partial(watchdog.at, "reading checkpoints or their store", slow=True))
        with (
            run_log.errors(),
            locked_by_main(exp, ranks, display.message) as lock,
            watchdog,
            mirrored_by_main(config, exp, ranks, resume, display.message, patience) as mirror,
            loader_processes(),
        ):
            run_log.open()
            log, began = display.message, time.monotonic()
            run = build_run(
                config, exp, ranks=ranks, device=device, resume=resume, log=log, mirror=mirror, patience=patience
            )
            with closing(run.engine), closing(run.store):
                finished = stopped_early(run.config, run.state) or run.state.update >= config.trainer.updates
                make_folder(exp, run.config, ranks, command, finished=finished)
                run_log.open()
                with explain_oom(config.batch):
                    per_forward = micro_batches_per_forward(run, display.message)
                    if not finished:
                        display.starting(describe_start(run, per_forward))
                    display.detail(f"the run was built in {time.monotonic() - began:.1f} s")
                    with around_updates():
                        return Trainer(run, stop, watchdog, per_forward, display, lock, callbacks, limit).train()
