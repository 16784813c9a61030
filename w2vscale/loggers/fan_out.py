"""One object that logs to all loggers of a run, on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from w2vscale.checkpoint.format import TrainState
from w2vscale.config import Config, dump_config
from w2vscale.files import read_metrics, read_text
from w2vscale.loggers.base import Histogram, Logger, RunFacts
from w2vscale.loggers.drawing import Picture
from w2vscale.loggers.jsonl import METRICS, JsonLogger
from w2vscale.loggers.samples import GROUP, SamplesLogger
from w2vscale.loggers.tags import Tags
from w2vscale.objectives import Objective, effective


class Loggers:
    """Logs to each of the loggers in turn; without any (on other ranks than 0), to none.

    metrics.jsonl is the first, so what another logger has is also there. Methods raise UserError if a file cannot be
    written.
    """

    def __init__(self, exp: Path, loggers: Sequence[Logger]) -> None:
        self._exp, self._loggers = exp, loggers
        self._uncommitted = False

    def begin(self, state: TrainState, config: Config) -> None:
        """Begin a run, or continue it from `state`. A new one logs its settings and the script that repeats it."""
        self.continue_from(state)
        if self._loggers and not state.update:
            self.text("run/settings", 0, dump_config(config))
            script = self._exp / "run.sh"
            self.text("run/script", 0, read_text(script) if script.is_file() else "")
            self.commit(0)

    def continue_from(self, state: TrainState) -> None:
        """Go back to `state`: what was logged after it is deleted, or not logged a second time."""
        for logger in self._loggers:
            logger.continue_from(state)

    def prepare(self) -> None:
        """Updates follow."""
        for logger in self._loggers:
            logger.prepare()

    def read(self, split: str) -> list[dict[str, Any]]:
        """Return the lines of one split in metrics.jsonl; none on a rank that does not log."""
        return read_metrics(self._exp / METRICS, split) if self._loggers else []

    def roll_backs_to(self, update: int) -> int:
        """Return how often the run has gone back to `update`; 0 on a rank that does not log."""
        # Two lines with the same number are of a run that was killed while it went back.
        lines = self.read("roll_back")
        return len({line.get("skipped_windows") for line in lines if line["update"] == update})

    def write(self, split: str, update: int, values: Mapping[str, float]) -> None:
        """Log metrics."""
        self._uncommitted = True
        for logger in self._loggers:
            logger.scalars(split, update, values)

    def text(self, name: str, update: int, text: str) -> None:
        """Log a text, if it is not empty."""
        if not text:
            return
        self._uncommitted = True
        for logger in self._loggers:
            logger.text(name, update, text)

    def histogram(self, name: str, update: int, histogram: Histogram) -> None:
        """Log a distribution."""
        self._uncommitted = True
        for logger in self._loggers:
            logger.histogram(name, update, histogram)

    def show(self, picture: Picture, update: int) -> None:
        """Log the pictures, audio and texts of some utterances."""
        self._uncommitted = True
        for logger in self._loggers:
            for name, png in picture.images.items():
                logger.image(GROUP + name, update, png)
            for name, audio in picture.audio.items():
                logger.audio(GROUP + name, update, audio)
            for name, text in picture.texts.items():
                logger.text(GROUP + name, update, text)

    def commit(self, update: int) -> None:
        """Everything of `update` has been logged. Called before its checkpoint is saved."""
        if not self._uncommitted:
            return
        self._uncommitted = False
        for logger in self._loggers:
            logger.commit(update)

    def finish(self) -> None:
        """The run is complete."""
        for logger in self._loggers:
            logger.finish()

    def close(self) -> None:
        """Close all files and connections."""
        for logger in self._loggers:
            logger.close()


def make_loggers(
    config: Config, objective: Objective, exp: Path, log: Callable[[str], None], *, enabled: bool
) -> Loggers:
    """Make the loggers that the settings ask for; none unless `enabled`.

    Raises UserError if a package is missing, or a service cannot be used as the settings say.
    """
    if not enabled:
        return Loggers(exp, [])
    splits = ("train", "validation", *(f"validation_{name}" for name in config.data.validation_sets))
    facts, settings = RunFacts(exp, effective(config), Tags(objective.panels(), splits)), config.logging
    loggers: list[Logger] = [JsonLogger(exp, log), SamplesLogger(exp)]
    # Imported here because the imports take seconds, and most runs need none of these.
    if settings.tensorboard:
        from w2vscale.loggers.tensorboard import TensorBoardLogger

        loggers.append(TensorBoardLogger(facts))
    if settings.wandb is not None:
        from w2vscale.loggers.remote import RemoteLogger
        from w2vscale.loggers.wandb import WandbService

        loggers.append(RemoteLogger(WandbService(settings.wandb, facts), facts, log))
    if settings.mlflow is not None:
        from w2vscale.loggers.mlflow import MlflowService
        from w2vscale.loggers.remote import RemoteLogger

        loggers.append(RemoteLogger(MlflowService(settings.mlflow, facts), facts, log))
    return Loggers(exp, loggers)
