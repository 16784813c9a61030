"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from w2vscale.checkpoint.store import TrainState
from w2vscale.config import Config
from w2vscale.data.loading import bad_audio_error
from w2vscale.data.micro_batch import BadAudio
from w2vscale.distributed.process_group import process_group, sum_over_ranks
from w2vscale.errors import UserError
from w2vscale.evaluation.pretraining import validate
from w2vscale.optim.schedules import gumbel_temperature, learning_rate
from w2vscale.training.display import Display
from w2vscale.training.metrics import Meter, MetricsWriter
from w2vscale.training.run import Run, build_run, log_bad_audio, make_folder
from w2vscale.training.signals import StopRequest
from w2vscale.training.watchdog import diagnose

T = TypeVar("T")


def train(config: Config, exp: Path, *, resume: str = "auto") -> int:
    """Train to `trainer.updates`, on all ranks. Returns 0, or 128 + the signal that stopped the run.

    Raises:
        UserError: something outside the program is wrong; the run's checkpoints are as they were.
    """
    with process_group() as (ranks, device), StopRequest() as stop:
        display = Display(total=config.trainer.updates, start=0, enabled=ranks.is_main)
        run = build_run(config, exp, ranks=ranks, device=device, resume=resume, log=display.message)
        make_folder(exp, config, ranks)
        try:
            Trainer(run, stop).train()
        finally:
            run.engine.close()
        return 0 if stop.received is None else 128 + stop.received


class Trainer:
    """One run's loop, with what it has seen since it started."""

    def __init__(self, run: Run, stop: StopRequest) -> None:
        self.run = run
        self.config = run.config
        self.stop = stop
        self.state = run.state
        self.meter = Meter(run.config.model.sampling_rate)
        self.metrics: MetricsWriter | None = None
        self.utterances = self.bad = 0
        self.reported: set[str] = set()
        self.last_bad: list[BadAudio] = []
        self.skipped_in_a_row = 0

    def train(self) -> TrainState:
        """Run all remaining updates."""
        config, run = self.config, self.run
        total = config.trainer.updates
        if run.ranks.is_main:
            self.metrics = MetricsWriter(run.exp, resumed_at=self.state.update, tensorboard=config.logging.tensorboard)
        with Display(total=total, start=self.state.update, enabled=run.ranks.is_main) as self.display:
            if self.state.update >= total:
                self.display.message(f"nothing to do: the run has its {total} updates (trainer.updates)")
            for window, waited in _timed(run.windows()):
                audio = sum(batch.audio_samples for batch in window) / config.model.sampling_rate
                bad = [audio for batch in window for audio in batch.bad]
                masked, audio, utterances, unusable, stopping = sum_over_ranks(
                    [
                        sum(batch.masked for batch in window),
                        audio,
                        sum(batch.utterances for batch in window),
                        len(bad),
                        self.stop.received is not None,
                    ]
                )
                denominator = torch.tensor(max(masked, 1.0))

                sums = run.engine.run_window(window, denominator)
                lr = learning_rate(self.state.update, optim=config.optim, schedule=config.schedule, updates=total)
                step = run.engine.step(lr=lr, max_norm=config.optim.max_norm)

                self.state = replace(
                    self.state,
                    update=self.state.update + 1,
                    audio_seconds=self.state.audio_seconds + audio,
                    skipped_updates=self.state.skipped_updates + step.skipped,
                    skipped_utterances=self.state.skipped_utterances + int(unusable),
                )
                self.meter.add(window, sums, step, data_seconds=waited)
                self._check_audio(bad, utterances + unusable, unusable)
                self._check_step(step.skipped, [batch.number for batch in window])
                last = self.state.update == total or stopping > 0
                saving = last or self.state.update % config.checkpoint.every == 0
                if saving or self.state.update % config.logging.every == 0:
                    self._log(lr)
                if run.validation_set and (
                    self.state.update == total or self.state.update % config.trainer.validate_every == 0
                ):
                    self._validate()
                if saving:
                    path = run.save(self.state)
                    self.display.message(f"update {self.state.update}/{total}  saved {path}")
                self.display.advance(self.state.update)
                if stopping:
                    name = self.stop.received.name if self.stop.received else "a signal to another rank"
                    self.display.message(f"stopped by {name}; the same command continues from here", "yellow")
                    break
        if self.metrics is not None:
            self.metrics.close()
        return self.state

    def _log(self, lr: float) -> None:
        values = self.meter.read()
        values |= {
            "lr": lr,
            "temperature": gumbel_temperature(self.state.update - 1, self.config.model),
            "hours_seen": self.state.audio_seconds / 3600,
            "skipped_updates": self.state.skipped_updates,
            "skipped_utterances": self.state.skipped_utterances,
        }
        if self.metrics is not None:
            self.metrics.write("train", self.state.update, values)
        self.display.training(self.state.update, values, codebooks=self.config.model.codebooks)
        for warning in diagnose(values, codebooks=self.config.model.codebooks):
            self.display.message(f"warning: {warning}", "yellow")

    def _validate(self) -> None:
        values, _ = validate(self.run.engine.evaluate, self.run.validation())
        values["hours_seen"] = self.state.audio_seconds / 3600
        if self.metrics is not None:
            self.metrics.write("validation", self.state.update, values)
        self.display.validation(self.state.update, values, codebooks=self.config.model.codebooks)

    def _check_audio(self, bad: list[BadAudio], seen: float, unusable: float) -> None:
        """Log unusable utterances; stop once they are too many of those seen."""
        log_bad_audio(self.run.exp, bad, self.reported)
        self.last_bad = bad or self.last_bad
        self.utterances += int(seen)
        self.bad += int(unusable)
        limit = self.config.data.max_bad_fraction
        enough = min(1000, len(self.run.training_set.plan))
        if self.utterances >= enough and self.bad > limit * self.utterances:
            raise bad_audio_error(self.bad, self.utterances, self.last_bad, limit)

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


def _timed(items: Iterator[T]) -> Iterator[tuple[T, float]]:
    """Each item and the seconds it was waited for."""
    while True:
        began = time.perf_counter()
        item = next(items, None)
        if item is None:
            return
        yield item, time.perf_counter() - began
