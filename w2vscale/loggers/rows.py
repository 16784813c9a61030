"""All that a run logs of one update, and how to read it back from the folder of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w2vscale.files import read_records
from w2vscale.loggers.base import Audio, Histogram
from w2vscale.loggers.jsonl import METRICS, NOTES
from w2vscale.loggers.samples import GROUP, sample_folders

SPLITS_WITHOUT_CURVES = ("roll_back",)  # is also a text; its update is before those that are replaced


@dataclass
class Row:
    """All that is logged of one update."""

    update: int
    scalars: dict[str, Mapping[str, float]] = field(default_factory=dict)  # by split
    texts: dict[str, str] = field(default_factory=dict)
    images: dict[str, bytes] = field(default_factory=dict)  # PNG
    audio: dict[str, Audio] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)


def read_rows(exp: Path) -> list[Row]:
    """Read what a run has logged so far, by update. Of pictures and audio only the newest are kept.

    Missing and damaged files are skipped, because a run must not end because of them.
    """
    rows: dict[int, Row] = {}

    def row(update: int) -> Row:
        return rows.setdefault(update, Row(update))

    for line in _records(exp / METRICS):
        split, update = line.pop("split", None), line.pop("update", None)
        if isinstance(split, str) and isinstance(update, int) and split not in SPLITS_WITHOUT_CURVES:
            values = {key: float("nan") if value is None else value for key, value in line.items()}
            row(update).scalars[split] = values
    for update, name, text in read_texts(exp):
        row(update).texts[name] = text
    for line in _records(exp / NOTES):
        if "histogram" in line:
            row(line["update"]).histograms[line["name"]] = Histogram(**line["histogram"])
    for update, folder in sample_folders(exp / "samples"):
        _read_samples(folder, row(update))
    return [rows[update] for update in sorted(rows)]


def read_texts(exp: Path) -> list[tuple[int, str, str]]:
    """Read (update, name, text) of all texts that a run has logged."""
    return [(line["update"], line["name"], line["text"]) for line in _records(exp / NOTES) if "text" in line]


def _records(path: Path) -> Sequence[dict[str, Any]]:
    try:
        return read_records(path)
    except OSError:
        return []


def _read_samples(folder: Path, row: Row) -> None:
    import soundfile

    for path in sorted(folder.iterdir()):
        name = GROUP + path.stem
        if path.suffix == ".png":
            row.images[name] = path.read_bytes()
        elif path.suffix == ".flac":
            row.audio[name] = Audio(*soundfile.read(path, dtype="float32"))
