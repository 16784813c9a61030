"""The folder `samples/update_N/` of a run: pictures, audio and text of validation utterances, of the newest updates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from w2vscale.checkpoint.format import TrainState
from w2vscale.files import delete, new_file, write_text, writing
from w2vscale.loggers.base import Audio, Logger

GROUP = "samples/"
KEPT = 5  # updates
FOLDER = re.compile(r"update_(\d{8,})")


class SamplesLogger(Logger):
    """Writes the pictures, audio and texts whose names begin with `samples/`."""

    def __init__(self, exp: Path) -> None:
        self.folder = exp / "samples"
        self._written = False  # since the last commit

    def continue_from(self, state: TrainState) -> None:
        for update, folder in sample_folders(self.folder):
            if update > state.update or not state.update:
                with writing(folder):
                    delete(folder)

    def text(self, name: str, update: int, text: str) -> None:
        if name.startswith(GROUP):
            write_text(self._path(name, update, ".txt"), text + "\n")

    def image(self, name: str, update: int, png: bytes) -> None:
        with new_file(self._path(name, update, ".png"), "wb") as file:
            file.write(png)

    def audio(self, name: str, update: int, audio: Audio) -> None:
        import soundfile

        with new_file(self._path(name, update, ".flac"), "wb") as file:
            soundfile.write(file, audio.waveform_S, audio.sampling_rate, format="FLAC")

    def commit(self, update: int) -> None:
        if self._written:
            for _, folder in list(sample_folders(self.folder))[:-KEPT]:
                with writing(folder):
                    delete(folder)
        self._written = False

    def _path(self, name: str, update: int, suffix: str) -> Path:
        self._written = True
        return self.folder / f"update_{update:08d}" / f"{name.removeprefix(GROUP)}{suffix}"


def sample_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield (update, folder) of all samples of a run, oldest first; nothing if there are none."""
    found = [(match, path) for path in folder.glob("update_*") if (match := FOLDER.fullmatch(path.name))]
    yield from sorted((int(match[1]), path) for match, path in found)
