"""The training loop."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from w2vscale.checkpoint.format import TrainState
from w2vscale.config import Config
from w2vscale.data.loading import loader_processes
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.distributed.process_group import process_group, sum_over_ranks
from w2vscale.engine.memory import explain_oom
from w2vscale.engine.transforms import compiled_graphs
from w2vscale.errors import UserError
from w2vscale.evaluation.validation import validate
from w2vscale.objectives import Objective, StepContext, Sums
from w2vscale.optim.schedules import learning_rate
from w2vscale.runtime import StopRequest
from w2vscale.training.agreement import compare_ranks, planned_work
from w2vscale.training.calibration import describe_update, micro_batches_per_forward
from w2vscale.training.display import Display
from w2vscale.training.metrics import Meter, MetricsWriter
from w2vscale.training.pending import HostCopy, Mark, PendingUpdate
from w2vscale.training.run import Run, build_run, make_folder

SLOW_LOADING = 0.3  # warn when more than this fraction of the time is spent waiting for data


def train(
    config: Config,
    exp: Path,
    *,
    resume: str = "auto",
    command: Sequence[str] | None = None,
    stop: StopRequest | None = None,
    around_updates: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """Train up to `trainer.updates`, on all ranks. Return 0, or 128 + the number of the signal that stopped the run.

    `exp` is the folder of the run; for `resume` see `build_run`; `command` are arguments of `w2vscale` to write into
    run.sh. `stop` is checked in every update. `around_updates` makes a context that is entered after everything is
    built and exited after the last update. Raises UserError if a setting, a file or the environment is wrong; existing
    checkpoints are not changed. The process must be prepared first: see `runtime.training`.
    """
    stop = stop or StopRequest()
    with process_group(needed=config.engine.name != "ddp") as (ranks, device):
        display = Display(total=config.trainer.updates, enabled=ranks.is_main)
        run = build_run(config, exp, ranks=ranks, device=device, resume=resume, log=display.message)
        with closing(run.engine):
            make_folder(exp, run.config, ranks, command)
            with explain_oom(config.batch):
                per_forward = micro_batches_per_forward(run, display.message)
                display.message(describe_update(run, per_forward))
                with around_updates():
                    state = Trainer(run, stop, per_forward, display).train()
        finished = state.update >= config.trainer.updates
        return 0 if finished or stop.received is None else 128 + stop.received


class Trainer:
    """The training loop of one run, and its state since it started or resumed."""

    def __init__(self, run: Run, stop: StopRequest, per_forward: int, display: Display) -> None:
        config = run.config
        self.run, self.config, self.stop, self.per_forward = run, config, stop, per_forward
        self.state = run.state
        self.total = config.trainer.updates
        self.meter = Meter(config.model.sampling_rate)
        self.metrics = MetricsWriter(
            run.exp,
            resumed_at=self.state,
            tensorboard=config.logging.tensorboard,
            by_audio={"loss", *(key for panel in run.objective.panels() for key in panel.keys)},
            enabled=run.ranks.is_main,
        )
        self.display = display
        self.lr = 0.0
        self.pending: PendingUpdate | None = None  # the last update, until `_settle`
        self.skipped_in_a_row = 0

    def train(self) -> TrainState:
        """Run the remaining updates, or stop early after a stop signal. Return the final state."""
        with closing(self.metrics), self.display.updating(self.state.update), loader_processes():
            if self.state.update >= self.total:
                self.display.message(f"nothing to do: the run has reached trainer.updates={self.total}")
            for window, waited in _timed(self.run.windows()):
                if self.state.update == self.run.state.update:  # the first window also waits for loaders to start
                    self.meter.exclude(waited)
                    waited = 0.0
                stopping = self._update(window, waited)
                self._log_validate_save(stopping)
                if stopping:
                    name = self.stop.received.name if self.stop.received else "a signal to another rank"
                    self.display.message(f"stopped by {name}; the same command continues from here", "yellow")
                    break
            self.run.store.wait()
            if unusable := self.run.bad_audio.summary():
                self.display.message(unusable, "yellow")
        return self.state

    def _update(self, window: list[MicroBatch], waited: float) -> bool:
        """Enqueue one update on the device, then wait for the previous one and count it.

        So the host is at most one update ahead of the device. Returns whether any rank has received a stop signal.
        """
        config, engine = self.config, self.run.engine
        arrived = Mark(self.run.device)
        bad = [audio for batch in window for audio in batch.bad]
        if self.state.update % config.engine.compare_ranks_every == 0:
            compare_ranks(planned_work(config, self.state.update))
        weight, samples, utterances, unusable, to_report, stopping, unsaved = sum_over_ranks(
            [
                sum(batch.weight for batch in window),
                sum(batch.audio_samples for batch in window),
                sum(batch.utterances for batch in window),
                sum(audio.left_out for audio in bad),
                len(bad),
                self.stop.received is not None,
                self.run.store.failed,
            ]
        )
        if unsaved:
            self.run.store.wait()

        update, objective = self.state.update, self.run.objective
        sums = engine.run_window(
            window, objective, StepContext(config.trainer.seed, update),
            per_forward=self.per_forward, denominator=torch.tensor(max(weight, 1.0)),
        )  # fmt: skip
        self.lr = learning_rate(update, optim=config.optim, schedule=config.schedule, updates=self.total)
        norm = HostCopy(engine.step(lr=self.lr, max_norm=config.optim.max_norm, after=_after_step(objective, update)))

        self.state = replace(
            self.state,
            update=self.state.update + 1,
            audio_seconds=self.state.audio_seconds + samples / config.model.sampling_rate,
            skipped_utterances=self.state.skipped_utterances + int(unusable),
            validation={},
        )
        previous = self.pending
        self._settle()
        if previous is not None:  # the host was ahead of the device, which had work for some of that time
            waited = min(waited, previous.norm.ready.seconds_to(arrived))
        self.pending = PendingUpdate(self.state.update, window, sums, norm, waited)
        if to_report:
            self.run.bad_audio.report(bad)
        self.run.bad_audio.count(seen=int(utterances + unusable), unusable=int(unusable))
        return stopping > 0

    def _settle(self) -> None:
        """Wait for the pending update and count it.

        Raises UserError if it is the last of `trainer.max_skipped_in_a_row` updates that were skipped.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        norm = pending.norm.read()
        self.meter.add(pending.window, pending.sums, norm, data_seconds=pending.data_seconds)
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.state = replace(self.state, skipped_updates=self.state.skipped_updates + 1)
        count = self.config.batch.micro_batches
        first = (pending.number - 1) * count
        self.display.message(
            f"warning: update {pending.number} skipped: its gradient is not finite "
            f"(micro-batches {first} to {first + count - 1})",
            "yellow",
        )
        if self.skipped_in_a_row >= self.config.trainer.max_skipped_in_a_row:
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row had gradients that are not finite, the last is update "
                f"{pending.number}: lower optim.lr ({self.config.optim.lr:g}) and resume from the newest checkpoint"
            )

    def _log_validate_save(self, stopping: bool) -> None:
        update, config = self.state.update, self.config
        ended = update == self.total
        saving = ended or stopping or update % config.checkpoint.every == 0
        # Log at every save, so that the metrics of a resumed run start exactly at its checkpoint.
        logging = saving or update % config.logging.every == 0
        validating = self.run.validation_set is not None and (ended or update % config.trainer.validate_every == 0)
        if logging or validating:
            self._settle()
        if logging:
            self._log()
            if gc.get_freeze_count():  # in `runtime.collected_between_steps`, so full collections are not automatic
                gc.collect()
        began = time.perf_counter()
        # Validate before saving, because the checkpoint stores the metrics.
        if validating:
            self._validate()
        if saving:
            self.run.save(self.state)
        self.meter.exclude(time.perf_counter() - began)
        self.display.advance(update)

    def _log(self) -> None:
        values = self.meter.read(self.run.objective.metrics)
        values |= {
            "lr": self.lr,
            **self.run.objective.scheduled(self.state.update - 1),
            "hours_seen": self.state.audio_seconds / 3600,
            **({"compiled_graphs": graphs} if (graphs := compiled_graphs()) else {}),
            "skipped_updates": self.state.skipped_updates,
            "skipped_utterances": self.state.skipped_utterances,
        }
        self.metrics.write("train", self.state.update, values)
        self.display.training(self.state.update, self.run.objective.line(values), values)
        warnings = list(self.run.objective.warnings(values))
        if (waiting := values["data_wait_fraction"]) > SLOW_LOADING:
            advice = "Raise data.workers, or use faster storage"
            warnings.append(f"{waiting:.0%} of the time was spent waiting for data. {advice}")
        for warning in warnings:
            self.display.message(f"warning: {warning}", "yellow")

    def _validate(self) -> None:
        bad: list[BadAudio] = []
        step = StepContext(self.config.trainer.seed, self.state.update)

        def evaluate(batch: MicroBatch) -> Sums:
            bad.extend(batch.bad)
            return self.run.engine.evaluate(batch, self.run.objective, step)

        values = validate(evaluate, self.run.validation(), self.run.objective.metrics)
        if values["unusable_utterances"]:
            self.run.bad_audio.report(bad)
        if not values["utterances"]:
            raise UserError(f"data.validation: no utterance could be read; see {self.run.bad_audio.path}")
        metric = self.config.trainer.best_metric
        if not math.isfinite(values.get(metric, math.nan)):
            self.display.message(f"warning: the validation has no finite {metric} (trainer.best_metric)", "yellow")
        self.state = replace(self.state, validation={key: one for key, one in values.items() if math.isfinite(one)})
        values["hours_seen"] = self.state.audio_seconds / 3600
        self.metrics.write("validation", self.state.update, values)
        self.display.validation(self.state.update, self.run.objective.line(values))


def _after_step(objective: Objective, update: int) -> Callable[[nn.Module], None] | None:
    """Return the objective's `after_step` hook bound to `update`, or None if it has none."""
    if not objective.changes_model:
        return None
    return partial(objective.after_step, update=update)


def _timed(windows: Iterator[list[MicroBatch]]) -> Iterator[tuple[list[MicroBatch], float]]:
    """Yield each window with the seconds spent waiting for it."""
    while True:
        began = time.perf_counter()
        window = next(windows, None)
        if window is None:
            return
        yield window, time.perf_counter() - began
