"""Does a manifest agree with its audio files? Compares headers, without decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import soundfile
from lhotse.cut import Cut

from w2vscale.data.manifest import Manifest, audio_path, build_index, index_path
from w2vscale.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One utterance that a run could not use as it is."""

    utterance: str
    file: str
    reason: str


@dataclass(frozen=True)
class Validation:
    """What was found in a manifest."""

    utterances: int
    problems: list[Problem]


def validate_manifest(path: Path, *, jobs: int = 4, progress: Callable[[int, int], None] | None = None) -> Validation:
    """Compare each utterance with its file's header: existence, format, sampling rate, channels, duration.

    Raises:
        UserError: the manifest itself cannot be read.
    """
    if not path.is_file() or not index_path(path).is_file():
        build_index(path)
    try:
        manifest = Manifest(path)
    except UserError:
        build_index(path)
        manifest = Manifest(path)
    problems: list[Problem] = []
    seen: set[str] = set()
    with ThreadPoolExecutor(jobs) as pool:
        numbers = iter(range(len(manifest)))
        done = 0
        while batch := list(islice(numbers, 1000)):
            cuts = [manifest.cut(number) for number in batch]
            for cut, reason in zip(cuts, pool.map(problem_of, cuts), strict=True):
                reason = f"the id {cut.id} occurs twice" if cut.id in seen else reason
                seen.add(cut.id)
                if reason:
                    problems.append(Problem(cut.id, audio_path(cut), reason))
            done += len(batch)
            if progress is not None:
                progress(done, len(manifest))
    return Validation(len(manifest), problems)


def problem_of(cut: Cut) -> str | None:
    """Why an utterance's file does not hold what the manifest says, or None."""
    return next(_problems(cut), None)


def libsndfile_reason(error: Exception) -> str:
    """An error in one line, without the file's path, which may be long."""
    return " ".join(str(getattr(error, "error_string", error)).split())[:200].removesuffix(".")


def _problems(cut: Cut) -> Iterator[str]:
    recording = cut.recording
    if cut.start < 0 or cut.end > recording.duration + 1e-3:
        yield f"ends at {cut.end:.3f} s, after its recording's {recording.duration:.3f} s"
    source = recording.sources[0]
    if source.type != "file":
        return
    try:
        header = soundfile.info(str(source.source))
    except Exception as error:
        exists = Path(str(source.source)).is_file()
        yield f"not readable as audio: {libsndfile_reason(error)}" if exists else "no such file"
        return
    rate = int((recording.transforms and header.samplerate) or recording.sampling_rate)
    if header.samplerate != rate:
        yield f"sampling rate is {header.samplerate} Hz, the manifest says {rate} Hz"
    seconds = header.frames / header.samplerate
    if not recording.transforms and abs(seconds - recording.duration) > 0.025:
        yield f"duration is {seconds:.3f} s, the manifest says {recording.duration:.3f} s"
    if max(source.channels) >= header.channels:
        yield f"has {header.channels} channels, the manifest wants channel {max(source.channels)}"
