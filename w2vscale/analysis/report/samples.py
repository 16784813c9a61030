"""Pictures and sounds that a run has saved of its validation samples: `EXP/samples/update_00001000/NAME.png` …"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from w2vscale.analysis.report.html import Html, element, section
from w2vscale.analysis.report.reading import Run
from w2vscale.files import regular

UPDATES = 3  # the newest of each run
LARGEST = 2**21  # bytes of a file
LARGEST_RUN = 2**23  # bytes of all files of a run
TYPES = {".png": ("image/png", b"\x89PNG"), ".flac": ("audio/flac", b"fLaC"), ".wav": ("audio/wav", b"RIFF")}


@dataclass(frozen=True)
class Sample:
    """A picture and a sound with the same name; either may be missing. Both are data: URLs."""

    name: str
    picture: str | None
    sound: str | None


def samples(runs: Sequence[Run]) -> Html:
    """The samples of the newest updates of each run; nothing if no run has any."""
    content = [part for run in runs for part in _of_run(run, alone=len(runs) == 1)]
    return section("Samples", *content, name="samples") if content else Html("")


def _of_run(run: Run, *, alone: bool) -> Iterator[Html]:
    budget, omitted, newest = LARGEST_RUN, 0, True
    for update, folder in _updates(run.exp / "samples")[:UPDATES]:
        found, size, left_out = read_samples(folder, budget)
        budget, omitted = budget - size, omitted + left_out
        if not found:
            continue
        title = f"update {update:,}" if alone else f"{run.name}, update {update:,}"
        figures = element("div", *(_figure(one, title) for one in found), class_="samples")
        yield element("details", element("summary", title), figures, open=newest)
        newest = False
    if omitted:
        yield element("p", f"{omitted} more files are in {run.exp / 'samples'}.", class_="note")


def _updates(folder: Path) -> list[tuple[int, Path]]:
    """The folders of updates, newest first."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return []
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"update_([0-9]{8,12})", name))]
    return [(number, folder / f"update_{number:08d}") for number in sorted(numbers, reverse=True)]


def read_samples(folder: Path, budget: int) -> tuple[list[Sample], int, int]:
    """The samples of a folder by name, the bytes of their files, and how many more files there are than `budget` bytes
    or the limit of a file allow."""
    urls: dict[tuple[str, str], str] = {}
    size = left_out = 0
    for path in sorted(path for path in folder.glob("*") if path.suffix in TYPES):
        content = _content(path)
        if content is None or size + len(content) > budget:
            left_out += 1
            continue
        size += len(content)
        kind, start = TYPES[path.suffix]
        if content.startswith(start):
            urls[path.stem, kind[:5]] = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    names = sorted({name for name, _ in urls}, key=_natural)
    return [Sample(name, urls.get((name, "image")), urls.get((name, "audio"))) for name in names], size, left_out


def _content(path: Path) -> bytes | None:
    """The content of a file; None if it is too large or no file."""
    try:
        with open(path, "rb", opener=regular) as file:
            content = file.read(LARGEST + 1)
    except OSError:
        return None
    return content if len(content) <= LARGEST else None


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer_2 before layer_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _figure(one: Sample, title: str) -> Html:
    words = one.name.replace("_", " ")
    picture = element("img", src=one.picture, alt=f"{words}, {title}") if one.picture else ""
    sound = element("audio", controls=True, preload="none", src=one.sound, aria_label=f"{words}, {title}")
    return element("figure", element("figcaption", words), picture, sound if one.sound else "")
