"""TensorBoard files: `tb/` by update, and `tb/by_hours/` by audio seen."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from w2vscale.checkpoint.format import TrainState
from w2vscale.files import delete, writing
from w2vscale.loggers.base import Audio, Histogram, Logger, RunFacts
from w2vscale.loggers.rows import SPLITS_WITHOUT_CURVES, read_texts
from w2vscale.loggers.tags import BY_HOURS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HPARAM_SECTIONS = ("model", "regularization", "objective", "augment", "batch", "optim", "schedule", "precision")
"""Sections of the settings that TensorBoard compares between runs."""


TEXTS = ".texts"
"""End of the name of the event file with texts."""


class Writers(NamedTuple):
    """The event files of a run."""

    by_update: SummaryWriter
    by_hours: SummaryWriter
    texts: SummaryWriter


class TensorBoardLogger(Logger):
    """Writes event files.

    TensorBoard drops the points that an interrupted run wrote after its checkpoint, because a new event file says where
    the run goes on (`purge_step`). Each axis has a folder, because this counts for all tags of a folder. Not every
    reader drops texts, so they have a file of their own, which is rewritten. Files are begun when there is something to
    write, because the import takes seconds. Raises UserError if a file cannot be written.
    """

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._folder = facts.exp / "tb"
        self._state = TrainState()
        self._texts: list[tuple[int, str, str]] = []  # those before this part of the run
        self._writers: Writers | None = None

    def continue_from(self, state: TrainState) -> None:
        self.close()
        self._state, self._writers = state, None
        self._texts = read_texts(self._facts.exp) if state.update else []
        if not state.update:  # nothing is left; a purge would keep texts and hyper-parameters of an earlier start
            with writing(self._folder):
                for path in self._folder.glob("**/events.out.tfevents.*"):
                    delete(path)

    def prepare(self) -> None:
        self._open()

    def scalars(self, split: str, update: int, values: Mapping[str, float]) -> None:
        if split in SPLITS_WITHOUT_CURVES:
            return
        tags = self._facts.tags
        writers = self._open()
        with writing(self._folder):
            for key, value in values.items():
                writers.by_update.add_scalar(tags.of(split, key), value, update)
                if tag := tags.by_hours(split, key):
                    writers.by_hours.add_scalar(tag, value, round(values["hours_seen"] * 3600))

    def text(self, name: str, update: int, text: str) -> None:
        self._open().texts.add_text(name, _as_code(text), update)

    def image(self, name: str, update: int, png: bytes) -> None:
        from io import BytesIO

        from PIL import Image

        with Image.open(BytesIO(png)) as image:
            self._open().by_update.add_image(name, np.asarray(image.convert("RGB")), update, dataformats="HWC")

    def audio(self, name: str, update: int, audio: Audio) -> None:
        waveform_1S = audio.waveform_S[np.newaxis]
        self._open().by_update.add_audio(name, waveform_1S, update, sample_rate=audio.sampling_rate)

    def histogram(self, name: str, update: int, histogram: Histogram) -> None:
        self._open().by_update.add_histogram_raw(
            name, histogram.edges[0], histogram.edges[-1], sum(histogram.counts), histogram.total,
            histogram.square_total, histogram.edges[1:], histogram.counts, update,
        )  # fmt: skip

    def commit(self, update: int) -> None:
        for writer in self._writers or ():
            with writing(self._folder):
                writer.flush()

    def finish(self) -> None:
        """End the session of the hyper-parameters; their metrics are the last values of the scalars."""
        if self._writers is not None:
            file_writer: Any = self._writers.by_update.file_writer
            file_writer.add_summary(self._hparams()[2])

    def close(self) -> None:
        for writer in self._writers or ():
            with suppress(OSError):  # `commit` has reported it
                writer.close()

    def _open(self) -> Writers:
        if self._writers is not None:
            return self._writers
        from torch.utils.tensorboard import SummaryWriter

        state = self._state
        with writing(self._folder):
            for path in self._folder.glob(f"events.out.tfevents.*{TEXTS}"):
                delete(path)
            # Readers take files in the order of their names, which begin with the second.
            while list(self._folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
                time.sleep(0.05)
            self._writers = Writers(
                SummaryWriter(str(self._folder), purge_step=state.update + 1),
                SummaryWriter(str(self._folder / BY_HOURS), purge_step=round(state.audio_seconds) + 1),
                SummaryWriter(str(self._folder), filename_suffix=TEXTS),
            )
        for update, name, text in self._texts:
            self._writers.texts.add_text(name, _as_code(text), update)
        if not state.update:
            file_writer: Any = self._writers.by_update.file_writer
            for summary in self._hparams()[:2]:
                file_writer.add_summary(summary)
            layout = {
                group: {key: ["Multiline", tags] for key, tags in charts.items()}
                for group, charts in self._facts.tags.charts().items()
            }
            self._writers.by_update.add_custom_scalars(layout)
        return self._writers

    def _hparams(self) -> tuple[Any, Any, Any]:
        """The summaries with which the hyper-parameters of a run begin (two) and end (one)."""
        from torch.utils.tensorboard.summary import hparams

        tags = self._facts.tags
        metrics = [tag for charts in tags.charts().values() for chart in charts.values() for tag in chart]
        summaries: tuple[Any, Any, Any] = hparams(hyper_parameters(self._facts), dict.fromkeys(metrics, 0.0))
        return summaries


def hyper_parameters(facts: RunFacts) -> dict[str, bool | float | str]:
    """Return the settings that TensorBoard compares between runs, as `section.key`."""
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for section in HPARAM_SECTIONS
        for key, value in facts.settings[section].items()
    }


def _as_code(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
