"""Pictures, sounds and texts of validation samples that a run has saved: `EXP/samples/update_00001000/NAME.png` …"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from w2vscale.analysis.report.html import Html, element, scroll_box, section
from w2vscale.analysis.report.reading import Run
from w2vscale.files import regular

UPDATES = 3  # the newest of each run
LARGEST = 2**21  # bytes of a file
LARGEST_RUN = 2**23  # bytes of all files of a run
LONGEST_TEXT = 5000  # characters
TYPES = {".png": ("image/png", b"\x89PNG"), ".flac": ("audio/flac", b"fLaC"), ".wav": ("audio/wav", b"RIFF")}
TEXT = "_text.txt"


@dataclass(frozen=True)
class Sample:
    """What belongs together: the files of an utterance (`3_spectrogram.png`, `3_audio.flac`, `3_text.txt`), or one
    name. Pictures and sounds are data: URLs by name."""

    title: str
    utterance: bool
    pictures: dict[str, str] = field(default_factory=dict)
    sounds: dict[str, str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


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
    """The samples of a folder, utterances first, the bytes of their files, and how many more files there are than
    `budget` bytes or the limit of a file allow."""
    found: dict[str, Sample] = {}
    size = left_out = 0
    paths = (path for path in folder.glob("*") if path.suffix in TYPES or path.name.endswith(TEXT))
    for path in sorted(paths, key=lambda path: _natural(path.name)):
        content = _content(path)
        if content is None or size + len(content) > budget:
            left_out += 1
            continue
        size += len(content)
        number = re.match(r"([0-9]+)_", path.stem)
        title = f"utterance {number[1]}" if number else path.stem.replace("_", " ")
        sample = found.setdefault(title, Sample(title, utterance=number is not None))
        words = path.stem.replace("_", " ")
        if path.suffix not in TYPES:
            sample.texts.append(content.decode(errors="replace")[:LONGEST_TEXT])
            continue
        kind, start = TYPES[path.suffix]
        if content.startswith(start):
            by_name = sample.pictures if kind.startswith("image") else sample.sounds
            by_name[words] = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    whole = [one for one in found.values() if one.pictures or one.sounds or one.texts]
    return sorted(whole, key=lambda one: not one.utterance), size, left_out


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
    """A picture is as wide as it was drawn, and scrolls: its labels are not readable if it is made smaller."""
    parts = [element("figcaption", one.title)]
    for name, url in one.pictures.items():
        label = f"{name}, {title}"
        parts.append(scroll_box(element("img", src=url, alt=label), label=f"picture: {label}"))
    for name, url in one.sounds.items():
        parts.append(element("audio", controls=True, preload="none", src=url, aria_label=f"{name}, {title}"))
    parts += [_line(line) for text in one.texts for line in text.splitlines() if line.strip()]
    return element("figure", *parts)


def _line(line: str) -> Html:
    """A line of a text, such as `hypothesis: …`, with its label set off."""
    label, colon, rest = line.partition(": ")
    if not colon or label not in ("reference", "hypothesis"):
        return element("p", line, class_="text", dir="auto")
    return element(
        "p", element("b", label), " ", element("span", rest.strip() or "(nothing)", dir="auto"), class_="text"
    )
