"""Notice audio files of which a part is missing. libsndfile opens them as if they were shorter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import IO

import soundfile

LEAST = 0.1  # seconds; less may be missing: some writers round or pad the size in the header

# What the log of libsndfile says of WAV, W64, AIFF and AU; of RF64; and of a WAV with something else behind its audio.
_SIZE = re.compile(r"^\s*(?:data|riff|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_FRAMES = re.compile(r"Calculated frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
_DATA = re.compile(r"^Length : (\d+)$.*^data : (\d+)$.*Exiting parser", re.MULTILINE | re.DOTALL)
_PROBLEMS = {
    "Seems to be a truncated file": "its audio ends early",  # VOC
    "Junk after the last page": "its stream of Ogg ends within a page, or before something else in the file",
}

_NIST = re.compile(rb"^sample_count -i (\d+)$", re.MULTILINE)


Opener = Callable[[], IO[bytes]]


def missing_part(file: soundfile.SoundFile, again: Opener | None) -> str | None:
    """What an open file lacks of what it says it has; None if nothing is known.

    `again` opens its bytes once more; None for a file object, which cannot be read twice.
    """
    log = file.extra_info
    for stated, found, unit in _sizes(file, log, again):
        is_known = not any(0 <= limit - stated < 2**16 for limit in (2**31, 2**32))  # or it was written to a pipe
        seconds = (stated - found) / max(found, 1) * file.frames / file.samplerate
        if is_known and stated > found and (seconds > LEAST or not file.frames):
            return f"its header says {stated:,} {unit}, but it has {found:,}"
    if (sizes := _DATA.search(log)) and int(sizes[2]) < int(sizes[1]) / 2:
        return f"its header says {int(sizes[2]):,} bytes of audio, but the file has {int(sizes[1]):,}"
    return next((problem for words, problem in _PROBLEMS.items() if words in log), None)


def _sizes(file: soundfile.SoundFile, log: str, again: Opener | None) -> Iterator[tuple[int, int, str]]:
    """How much a file says it has, and how much it has, of what, as far as both are known."""
    if sizes := _SIZE.search(log):
        yield int(sizes[1]), int(sizes[2]), "bytes of audio"
    if sizes := _FRAMES.search(log):
        yield int(sizes[2]), int(sizes[1]), "samples"
    if again is not None and file.format == "NIST":
        with again() as stored:
            if count := _NIST.search(stored.read(1024)):
                yield int(count[1]), file.frames, "samples"
