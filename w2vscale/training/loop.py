"""The training loop."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from w2vscale.checkpoint.format import TrainState
from w2vscale.config import Config
from w2vscale.data.loading import loader_processes
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.distributed.process_group import process_group, sum_over_ranks
from w2vscale.engine.compilation import compiled_graphs
from w2vscale.engine.memory import lack_of_memory_told
from w2vscale.errors import UserError
from w2vscale.evaluation.validation import validate
from w2vscale.optim.schedules import learning_rate
from w2vscale.training.agreement import compare_ranks, planned_work
from w2vscale.training.calibration import calibrate
from w2vscale.training.display import Display
from w2vscale.training.garbage import collected_between_steps
from w2vscale.training.metrics import Meter, MetricsWriter
from w2vscale.training.run import Run, build_run, make_folder
from w2vscale.training.signals import StopRequest
from w2vscale.training.watchdog import slow_loading

T = TypeVar("T")


def train(config: Config, exp: Path, *, resume: str = "auto") -> int:
    """Train to `trainer.updates`, on all ranks. Returns 0, or 128 + the signal that stopped the run.

    Raises:
        UserError: something outside the program is wrong; the run's checkpoints are as they were.
    """
    with process_group(needed=config.engine.name != "ddp") as (ranks, device), StopRequest() as stop:
        display = Display(total=config.trainer.updates, start=0, enabled=ranks.is_main)
        run = build_run(config, exp, ranks=ranks, device=device, resume=resume, log=display.message)
        make_folder(exp, config, ranks)
        try:
            with lack_of_memory_told(config):
                if config.batch.concat == "auto":
                    calibrate(run, display.message)
                state = Trainer(run, stop).train()
        finally:
            run.engine.close()
        finished = state.update >= config.trainer.updates
        return 0 if finished or stop.received is None else 128 + stop.received


class Trainer:
    """One run's loop, with what it has seen since it started."""

    def __init__(self, run: Run, stop: StopRequest) -> None:
        config = run.config
        self.run, self.config, self.stop = run, config, stop
        self.state = run.state
        self.total = config.trainer.updates
        self.meter = Meter(config.model.sampling_rate)
        self.metrics = MetricsWriter(
            run.exp,
            resumed_at=self.state,
            tensorboard=config.logging.tensorboard,
            enabled=run.ranks.is_main,
        )
        self.display = Display(total=self.total, start=self.state.update, enabled=run.ranks.is_main)
        self.lr = 0.0
        self.skipped_in_a_row = 0

    def train(self) -> TrainState:
        """Run all remaining updates, or until a signal asks to stop."""
        with self.metrics, self.display, loader_processes(), collected_between_steps():
            if self.state.update >= self.total:
                self.display.message(f"nothing to do: the run has its {self.total} updates (trainer.updates)")
            for window, waited in _timed(self.run.windows()):
                if self.state.update == self.run.state.update:  # the loader processes were starting
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
        """One update. Returns whether any rank was asked to stop."""
        config, engine = self.config, self.run.engine
        bad = [audio for batch in window for audio in batch.bad]
        if self.state.update % config.engine.compare_ranks_every == 0:
            compare_ranks(planned_work(config, self.state.update))
        masked, samples, utterances, unusable, to_report, stopping, unsaved = sum_over_ranks(
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

        sums = engine.run_window(window, torch.tensor(max(masked, 1.0)))
        self.lr = learning_rate(self.state.update, optim=config.optim, schedule=config.schedule, updates=self.total)
        step = engine.step(lr=self.lr, max_norm=config.optim.max_norm)

        self.state = replace(
            self.state,
            update=self.state.update + 1,
            audio_seconds=self.state.audio_seconds + samples / config.model.sampling_rate,
            skipped_updates=self.state.skipped_updates + step.skipped,
            skipped_utterances=self.state.skipped_utterances + int(unusable),
            validation_loss=None,
        )
        self.meter.add(window, sums, step, data_seconds=waited)
        if to_report:
            self.run.bad_audio.report(bad)
        self.run.bad_audio.count(seen=int(utterances + unusable), unusable=int(unusable))
        self._check_step(step.skipped, [batch.number for batch in window])
        return stopping > 0

    def _log_validate_save(self, stopping: bool) -> None:
        update, config = self.state.update, self.config
        ended = update == self.total
        saving = ended or stopping or update % config.checkpoint.every == 0
        # Before each save, so that the figures of a resumed run start where the checkpoint does.
        if saving or update % config.logging.every == 0:
            self._log()
            gc.collect()
        began = time.perf_counter()
        # Before the save: the checkpoint remembers its loss.
        if self.run.validation_set and (ended or update % config.trainer.validate_every == 0):
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
            **({"compiled_graphs": compiled_graphs()} if self.config.engine.compile else {}),
            "skipped_updates": self.state.skipped_updates,
            "skipped_utterances": self.state.skipped_utterances,
        }
        self.metrics.write("train", self.state.update, values)
        self.display.training(self.state.update, self.run.objective.line(values), values)
        for warning in (*self.run.objective.diagnose(values), *slow_loading(values)):
            self.display.message(f"warning: {warning}", "yellow")

    def _validate(self) -> None:
        bad: list[BadAudio] = []
        batches = _noting_bad_audio(self.run.validation(), bad)
        values, _ = validate(self.run.engine.evaluate, batches, self.run.objective.metrics)
        if values["unusable_utterances"]:
            self.run.bad_audio.report(bad)
        if math.isnan(values["loss"]):
            raise UserError(f"data.validation: no utterance could be read; see {self.run.bad_audio.path}")
        self.state = replace(self.state, validation_loss=values["loss"] if math.isfinite(values["loss"]) else None)
        values["hours_seen"] = self.state.audio_seconds / 3600
        self.metrics.write("validation", self.state.update, values)
        self.display.validation(self.state.update, self.run.objective.line(values))

    def _check_step(self, skipped: bool, numbers: list[int]) -> None:
        """Report a skipped update; stop after too many in a row."""
        if not skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.display.message(
            f"warning: update {self.state.update} skipped: its gradient is not finite "
            f"(micro-batches {numbers[0]} … {numbers[-1]})",
            "yellow",
        )
        if self.skipped_in_a_row >= self.config.trainer.max_skipped_in_a_row:
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row had gradients that are not finite, the last is update "
                f"{self.state.update}: lower optim.lr ({self.config.optim.lr:g}), continue from the newest checkpoint"
            )


def _noting_bad_audio(batches: Iterator[MicroBatch], bad: list[BadAudio]) -> Iterator[MicroBatch]:
    for batch in batches:
        bad += batch.bad
        yield batch


def _timed(items: Iterator[T]) -> Iterator[tuple[T, float]]:
    """Each item and the seconds it was waited for."""
    while True:
        began = time.perf_counter()
        item = next(items, None)
        if item is None:
            return
        yield item, time.perf_counter() - began
