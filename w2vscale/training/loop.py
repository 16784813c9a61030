"""The training loop."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from w2vscale.checkpoint.format import committed, update_of
from w2vscale.checkpoint.lock import Lock
from w2vscale.data.loading import end_loader_processes
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.distributed.process_group import (
    broadcast_from_main,
    errors_on_all_ranks,
    gather_from_ranks,
    largest_over_ranks,
    sum_over_ranks,
)
from w2vscale.engine.transforms import compiled_graphs
from w2vscale.errors import TemporaryError, UserError
from w2vscale.evaluation.validation import validate
from w2vscale.objectives import Objective, StepContext, Sums
from w2vscale.optim.schedules import learning_rate
from w2vscale.runtime import Interrupted, StopRequest
from w2vscale.training.agreement import compare_ranks, planned_work
from w2vscale.training.callbacks import Callbacks
from w2vscale.training.display import Display
from w2vscale.training.early_stopping import best_validation, describe_end, stopped_early
from w2vscale.training.efficiency import mfu_per_rate
from w2vscale.training.health import History, Trouble, examine, examine_all
from w2vscale.training.metrics import Meter
from w2vscale.training.observing import log_histograms, log_samples, open_loggers
from w2vscale.training.pending import HostCopy, Mark, PendingUpdate
from w2vscale.training.profiling import Profiler
from w2vscale.training.run import Run
from w2vscale.training.skips import explain_skips
from w2vscale.training.time_limit import TimeLimit
from w2vscale.training.uploads import finish_uploads
from w2vscale.training.watchdog import Watchdog

SLOW_LOADING = 0.3  # warn when more than this fraction of the time is spent waiting for data
SLOW_UPDATE = 5.0  # seconds; a stop signal interrupts longer updates between two forwards
ROLL_BACKS = 3  # to the same checkpoint; trouble that comes back once more ends the run


class Agreement(NamedTuple):
    """What all ranks know of an update before they run it: sums over the ranks."""

    weight: float = 0.0
    samples: float = 0.0
    utterances: float = 0.0
    unusable: float = 0.0
    to_report: float = 0.0  # bad utterances to list
    stopping: float = 0.0  # ranks that have received a stop signal, or whose time is over
    unsaved: float = 0.0  # ranks that could not write the last checkpoint
    seconds: float = 0.0  # of the last update


class Trainer:
    """The training loop of one run, and its state since it started or resumed."""

    def __init__(
        self,
        run: Run,
        stop: StopRequest,
        watchdog: Watchdog,
        per_forward: int,
        display: Display,
        lock: Lock | None = None,
        callbacks: Callbacks = Callbacks(),  # noqa: B008 - it cannot change
        limit: TimeLimit | None = None,
    ) -> None:
        config = run.config
        self.run, self.config, self.per_forward = run, config, per_forward
        self.stop, self.watchdog, self.lock = stop, watchdog, lock
        self.state = run.state
        self.logged = self.saved = run.state.update  # newest update whose metrics or state need no writing
        self.logged_before = run.state.update  # that of the log line before
        self.update_seconds = math.inf  # of the last update; the first one counts as slow
        self.total = config.trainer.updates
        self.meter = Meter(config.model.sampling_rate, run.device)
        self.metrics = open_loggers(run, display.message)
        self.history = self._history()
        self.display, self.callbacks = display, callbacks
        # Saving is collective, so all ranks wait for checkpoints if one of them wants to see them.
        self.waits = bool(largest_over_ranks([callbacks.on_checkpoint is not None])[0])
        self.lr = 0.0
        self.shown: MicroBatch | None = None  # the validation micro-batch whose samples are logged
        self.mfu_per_rate = mfu_per_rate(run)
        self.pending: PendingUpdate | None = None  # the last update, until `_settle`
        self.skipped_in_a_row = 0
        self.slow_loading = False
        self.limit = limit or TimeLimit(None, grace=0.0)
        main, updates = run.ranks.is_main, config.trainer.profiled
        self.profiler = Profiler(updates, run.exp / "profile", enabled=main, log=display.message)
        if updates and self.state.update >= updates[-1] and not self.finished:
            display.message(
                f"trainer.profile={config.trainer.profile}: the run is past these updates; no trace is made"
            )

    @property
    def ended(self) -> bool:
        """Whether the run stops early."""
        return stopped_early(self.config, self.state)

    @property
    def finished(self) -> bool:
        """Whether no update is left."""
        return self.ended or self.state.update >= self.total

    def train(self) -> int:
        """Run the remaining updates. Returns the exit code; see the function `train`."""
        with closing(self.metrics), self.display.updating(self.state.update), closing(self.profiler):
            if self.ended:
                self.display.message(f"nothing to do: {describe_end(self.state, self.config, self.run.exp)}")
            elif self.finished:
                self.display.message(f"nothing to do: the run has reached trainer.updates={self.total}")
            ended_before = self.ended
            try:
                if self.state.update and self._validation_is_missing():
                    self._validate_and_log_end()  # a stop signal has prevented it
                    self.metrics.commit(self.state.update)
                    self._save()
                if not self.finished:
                    self.metrics.prepare()
                while not self.finished:
                    self._train_on(self.run.windows())
                    end_loader_processes()  # a roll back needs other windows
            except Interrupted:
                end_loader_processes()
                return self._stop()
            self.metrics.finish()
            uploaded = self._finish()
            if self.ended and not ended_before:
                self.display.stopped(describe_end(self.state, self.config, self.run.exp), early=True)
            if not uploaded:
                return TemporaryError.exit_code
            if not self.ended:
                self.display.finished(self.run.exp, self.run.state.update)
            return 0

    def _train_on(self, windows: Iterator[list[MicroBatch]]) -> None:
        """Run updates to the last one, or until the run goes back to a checkpoint."""
        while not self.finished:
            number = self.state.update + 1
            if self.profiler.due(number):
                self.watchdog.at(f"update {number}, with the profiler", slow=True)
            with self.profiler.recording(number):
                self._update(windows)
            if trouble := self._log_validate_save():
                self._roll_back(trouble)
                return

    def _update(self, windows: Iterator[list[MicroBatch]]) -> None:
        """Enqueue one update on the device, then wait for the previous one and count it.

        So the host is at most one update ahead of the device. Raises Interrupted on all ranks if one of them has
        received a stop signal.
        """
        config, engine, update, objective = self.config, self.run.engine, self.state.update, self.run.objective
        first = update == self.run.state.update  # it also waits for loaders to start, and compiles
        self.watchdog.at(f"update {update + 1}, waiting for data", slow=first)
        window, waited = self._next_window(windows)
        began = time.perf_counter()
        self.watchdog.at(f"update {update + 1}", slow=first)
        arrived = Mark(self.run.device)
        bad = [audio for batch in window for audio in batch.bad]
        if update % config.engine.compare_ranks_every == 0:
            compare_ranks(planned_work(config, self.state))
        agreed = self._agree(window, bad)
        if agreed.stopping:
            raise Interrupted
        if agreed.unsaved:
            self.run.store.wait()

        interruptible = agreed.seconds > SLOW_UPDATE * self.run.ranks.world_size

        def between_forwards() -> None:
            self.watchdog.at(f"update {update + 1}", slow=first)
            if interruptible:
                self._raise_if_stopping()

        sums = engine.run_window(
            window, objective, StepContext(config.trainer.seed, update),
            per_forward=self.per_forward, denominator=torch.tensor(max(agreed.weight, 1.0)),
            between_forwards=between_forwards,
        )  # fmt: skip
        self.lr = learning_rate(update, optim=config.optim, schedule=config.schedule, updates=self.total)
        norm = HostCopy(engine.step(lr=self.lr, max_norm=config.optim.max_norm, after=_after_step(objective, update)))

        self.state = replace(
            self.state,
            update=update + 1,
            audio_seconds=self.state.audio_seconds + agreed.samples / config.model.sampling_rate,
            skipped_utterances=self.state.skipped_utterances + int(agreed.unusable),
            validation={},
        )
        previous = self.pending
        self._settle()
        if previous is not None:  # the host was ahead of the device, which had work for some of that time
            waited = min(waited, previous.norm.ready.seconds_to(arrived))
        if first:
            self.meter.exclude(waited)
            waited = 0.0
        self.pending = PendingUpdate(self.state.update, window, sums, norm, max(agreed.weight, 1.0), waited)
        if self.skipped_in_a_row + 1 >= config.trainer.max_skipped_in_a_row:
            self._settle()  # so that, if this is the last skip, the weights are still those of its window
        if agreed.to_report:
            self._report(bad)
        self.run.bad_audio.count(seen=int(agreed.utterances + agreed.unusable), unusable=int(agreed.unusable))
        self.update_seconds = time.perf_counter() - began

    def _next_window(self, windows: Iterator[list[MicroBatch]]) -> tuple[list[MicroBatch], float]:
        """Return the next window and the seconds spent waiting for it. A stop signal ends the wait without a window."""
        began = time.perf_counter()
        try:
            with self.stop.interrupting():
                return next(windows), time.perf_counter() - began
        except Interrupted:
            return [], 0.0

    def _report(self, bad: Sequence[BadAudio]) -> None:
        """List bad audio of all ranks. Collective."""
        for audio in self.run.bad_audio.report(bad):
            self.display.detail(f"bad audio: {audio}")

    def _agree(self, window: list[MicroBatch], bad: Sequence[BadAudio]) -> Agreement:
        """Sum over all ranks what they have to know of an update. Collective."""
        own = Agreement(
            weight=sum(batch.weight for batch in window),
            samples=sum(batch.audio_samples for batch in window),
            utterances=sum(batch.utterances for batch in window),
            unusable=sum(audio.left_out for audio in bad),
            to_report=len(bad),
            stopping=self._is_stopping(),
            unsaved=self.run.store.failed,
            seconds=self.update_seconds,
        )
        return Agreement(*sum_over_ranks(own))

    def _is_stopping(self) -> bool:
        """Whether this rank has received a stop signal, or has to save now to keep within `trainer.max_hours`."""
        if self.stop.received is not None:
            return True
        return self.limit.reached(save_seconds=self.run.store.seconds, update_seconds=self.update_seconds)

    def _raise_if_stopping(self) -> None:
        """Raise Interrupted on all ranks if one of them has to stop. Collective."""
        if largest_over_ranks([self._is_stopping()])[0]:
            raise Interrupted

    def _stop(self) -> int:
        """Save after a stop signal on any rank, or at the end of the time. Return the exit code. Collective."""
        self._settle()
        if self.state.update > self.saved:
            if self.state.update > self.logged:
                self._log()
            if not self._validation_is_missing():  # the run that continues adds it to what this update has logged
                self.metrics.commit(self.state.update)
            self._save()
        self._finish()
        received = max((number for number in gather_from_ranks(self.stop.received) if number is not None), default=None)
        cause = f"trainer.max_hours={self.config.trainer.max_hours:g}" if received is None else received.name
        where = "continues from here" if self.state.update else "starts again: no update was complete"
        self.display.stopped(f"stopped by {cause}; the same command {where}")
        return TemporaryError.exit_code if received is None else 128 + received

    def _finish(self) -> bool:
        """Wait until the last checkpoint is written and uploaded. Returns whether it is in the store. Collective."""
        self.watchdog.at("saving", slow=True)
        self.run.store.wait()
        uploaded = True
        if self.config.checkpoint.store is not None:
            note = partial(self.watchdog.at, "uploading the last checkpoint", slow=True)
            grace = self.config.checkpoint.grace_seconds
            uploaded = finish_uploads(self.run.store.mirror, self.stop, self.limit, grace=grace, note=note)
        if unusable := self.run.bad_audio.summary():
            self.display.important(unusable)
        return uploaded

    def _settle(self) -> None:
        """Wait for the pending update and count it.

        Raises UserError if it is the last of `trainer.max_skipped_in_a_row` updates that were skipped, and keeps its
        window.
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
        first = (pending.number - 1 + self.state.skipped_windows) * count
        self.display.message(
            f"warning: update {pending.number} skipped: its gradient is not finite "
            f"(micro-batches {first} to {first + count - 1})"
        )
        if self.skipped_in_a_row >= self.config.trainer.max_skipped_in_a_row:
            self.watchdog.at("saving the window of a skipped update", slow=True)
            raise UserError(explain_skips(self.run, pending, self.skipped_in_a_row, per_forward=self.per_forward))

    def _log_validate_save(self) -> Trouble | None:
        """Log, validate and save if it is time. Return trouble because of which the run has to go back. Collective.

        Raises UserError if the run has to stop because of trouble. Then nothing of this update is saved.
        """
        update, config = self.state.update, self.config
        saving = update == self.total or update % config.checkpoint.every == 0
        # Log at every save, so that the metrics of a resumed run start exactly at its checkpoint.
        logging = saving or update % config.logging.every == 0
        validating = self._validation_is_due()
        if logging or validating:
            self._settle()
        if logging:
            self._log()
            if trouble := self._lasting_trouble():
                return trouble
            if gc.get_freeze_count():  # in `runtime.collected_between_steps`, so full collections are not automatic
                gc.collect()
        began = time.perf_counter()
        # Validate before saving, because the checkpoint stores the metrics.
        if validating:
            self._validate_and_log_end()
        self.metrics.commit(update)
        if saving or self.ended:
            self._save()
        self.meter.exclude(time.perf_counter() - began)
        self.display.advance(update, saved=self.run.store.newest)
        return None

    def _lasting_trouble(self) -> Trouble | None:
        """Return trouble because of which the run has to go back. Raises UserError if it has to stop. Collective.

        Rank 0 decides for all: it alone has the log lines from before the run was resumed.
        """
        health = self.config.health
        if health.action == "warn":
            return None
        trouble: Trouble | None = broadcast_from_main(self.history.lasting(health.patience))
        if trouble is not None and health.action == "stop":
            self.run.store.wait()
            before = [path for path in committed(self.run.store.folder) if update_of(path) <= trouble.since]
            advice = f"continue with --resume {before[-1]}" if before else "no checkpoint is from before it"
            raise UserError(f"stopped at update {self.state.update} (health.action=stop): {trouble}; {advice}")
        return trouble

    def _roll_back(self, trouble: Trouble) -> None:
        """Go back to the newest checkpoint from before `trouble`, and skip the windows since then. Collective.

        Raises UserError if there is none, or trouble has come back to it too often.
        """
        self.watchdog.at("going back to a checkpoint", slow=True)
        self.profiler.close()
        store, left = self.run.store, self.state
        store.wait()
        checkpoint = store.find(self.display.message, up_to=trouble.since)
        if checkpoint is None:
            raise UserError(f"stopped at update {left.update}: {trouble}; no checkpoint is from before it")
        back = checkpoint.state
        if broadcast_from_main(self.metrics.roll_backs_to(back.update)) >= ROLL_BACKS:
            raise UserError(
                f"stopped at update {left.update}: {trouble}; the run has gone back to {checkpoint.path} "
                f"{ROLL_BACKS} times, and other data did not help"
            )
        self.display.went_back(
            back.update,
            f"going back from update {left.update} to the checkpoint of update {back.update}, and skipping the data "
            f"since then: {trouble}",
        )
        self.run.engine.import_state(checkpoint)
        skipped = left.skipped_windows + left.update - back.update
        self.run.state = self.state = replace(back, skipped_windows=skipped, data=left.data)
        # Before the checkpoint is saved, with which the metrics are uploaded.
        self.metrics.write("roll_back", back.update, {"left_at": left.update, "skipped_windows": skipped})
        # Saved again, so that a killed run skips them, too. Later checkpoints are set aside by this.
        self._save()
        store.wait()
        self.metrics.continue_from(self.state)
        self.metrics.text("run/roll_back", back.update, f"went back from update {left.update}: {trouble}")
        self.history = self._history()
        self.logged, self.skipped_in_a_row = back.update, 0
        self.meter = Meter(self.config.model.sampling_rate, self.run.device)

    def _history(self) -> History:
        """Return what the log lines so far say about the next one; on rank 0."""
        return examine_all(self.metrics.read("train"), config=self.config, objective=self.run.objective)

    def _validation_is_due(self) -> bool:
        due = self.state.update == self.total or self.state.update % self.config.trainer.validate_every == 0
        return due and self.run.validation_set is not None

    def _validation_is_missing(self) -> bool:
        """Whether a stop signal has come before the validation of this update, or in it."""
        return self._validation_is_due() and not self.state.validation

    def _save(self) -> None:
        self.watchdog.at("saving", slow=True)
        with errors_on_all_ranks():
            if self.lock is not None:
                self.lock.require()
        path = self.run.save(self.state)
        self.saved = self.state.update
        if self.waits:
            self.run.store.wait()
            self._call(self.callbacks.on_checkpoint, path)

    def _log(self) -> None:
        self.logged_before, self.logged = self.logged, self.state.update
        values = self.meter.read(self.run.objective.metrics)
        scheduled = self.run.objective.scheduled(self.state.update - 1)
        # Operations are counted with the backward of the encoder, which a frozen one does not have.
        mfu_per_rate = None if scheduled.get("encoder_frozen") else self.mfu_per_rate
        values |= {
            "lr": self.lr,
            **scheduled,
            "hours_seen": self.state.audio_seconds / 3600,
            **({"mfu": mfu_per_rate * values["audio_seconds_per_second"]} if mfu_per_rate else {}),
            **({"compiled_graphs": graphs} if (graphs := compiled_graphs()) else {}),
            "skipped_updates": self.state.skipped_updates,
            "skipped_utterances": self.state.skipped_utterances,
            "skipped_windows": self.state.skipped_windows,
        }
        self.metrics.write("train", self.state.update, values)
        self.display.training(self.state.update, self.run.objective.line(values), values)
        earlier, config, objective = self.history, self.config, self.run.objective
        self.history = examine(earlier, self.state.update, values, config=config, objective=objective)
        findings = self.history.new_since(earlier)
        for finding in findings:
            self.display.finding(finding)
        was_slow, self.slow_loading = self.slow_loading, (waiting := values["data_wait_fraction"]) > SLOW_LOADING
        if self.slow_loading and not was_slow:
            advice = "Raise data.workers, or use faster storage"
            self.display.message(f"warning: {waiting:.0%} of the time was spent waiting for data. {advice}")
        self.metrics.text("run/health", self.state.update, "\n".join(finding.text for finding in findings))
        log_histograms(self.run, self.metrics, self.logged, after=self.logged_before, last=self.finished)
        self._call(self.callbacks.on_update, values)

    def _call(self, function: Callable[[int, Any], object] | None, value: Any) -> None:
        """Call a function of the user, if there is one, on rank 0."""
        if function is not None and self.run.ranks.is_main:
            function(self.state.update, value)

    def _validate(self) -> None:
        """Validate on all sets, keep the metrics of the main one in the state, and see whether the run has to end.

        Raises Interrupted on all ranks if one of them has to stop; then nothing is written.
        """
        with self.run.engine.averaged():
            values = self._metrics_of(None)
            sets = {"validation": values}
            sets |= {f"validation_{name}": self._metrics_of(name) for name in self.run.further_sets}
        metric = self.config.trainer.best_metric
        if not math.isfinite(value := values.get(metric, math.nan)):
            self.display.message(f"warning: the validation has no finite {metric} (trainer.best_metric)")
        best = broadcast_from_main(best_validation(self.state.best, metric, value, self.state.update))
        finite = {key: one for key, one in values.items() if math.isfinite(one)}
        self.state = replace(self.state, validation=finite, best=best)
        for split, found in sets.items():
            found["hours_seen"] = self.state.audio_seconds / 3600
            self.metrics.write(split, self.state.update, found)
            self.display.validation(self.state.update, self.run.objective.line(found), split.replace("_", " ", 1))
        log_samples(self.run, self.metrics, self.shown, self.state.update, self.display.message, last=self.finished)
        self._call(self.callbacks.on_validation, values)

    def _validate_and_log_end(self) -> None:
        """Validate and, if the run ends early here, log what every last update logs. Raises as `_validate`."""
        self._validate()
        if self.ended and self.logged < self.state.update:
            self._log()
        elif self.ended:
            log_histograms(self.run, self.metrics, self.logged, after=self.logged_before, last=True, repeated=True)

    def _metrics_of(self, name: str | None) -> dict[str, float]:
        """Return the metrics of the validation set, or of the further one with this name. Raises as `_validate`."""
        bad: list[BadAudio] = []
        step = StepContext(self.config.trainer.seed, self.state.update)

        def evaluate(batch: MicroBatch) -> Sums:
            self.watchdog.at("validation")
            self._raise_if_stopping()
            bad.extend(batch.bad)
            if name is None and self.shown is None:
                self.shown = batch
            return self.run.engine.evaluate(batch, self.run.objective, step)

        values = validate(evaluate, self.run.validation(name), self.run.objective.metrics)
        if values["unusable_utterances"]:
            self._report(bad)
        if not values["utterances"]:
            setting = "data.validation" if name is None else f"data.validation_sets.{name}"
            raise UserError(f"{setting}: no utterance could be read; see {self.run.bad_audio.path}")
        return values


def _after_step(objective: Objective, update: int) -> Callable[[nn.Module], None] | None:
    """Return the objective's `after_step` hook bound to `update`, or None if it has none."""
    if not objective.changes_model:
        return None
    return partial(objective.after_step, update=update)
