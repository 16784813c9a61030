"""Write manifests of many audio files: read their headers in parallel, make their cuts, and report what is left out."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lhotse import Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut, MonoCut
from lhotse.utils import fastcopy

from w2vscale.corpora.finding import Unusable
from w2vscale.corpora.header_cache import Header, HeaderCache
from w2vscale.corpora.manifests import PreparedManifest, line_of
from w2vscale.corpora.parallel import Progress, chunked, no_progress, parallel_map
from w2vscale.corpora.report import Report
from w2vscale.corpora.segments import SHORTEST, Segment
from w2vscale.corpora.speech import find_speech
from w2vscale.data.audio import RATES_IN_WORDS, SAMPLING_RATES, check_channel
from w2vscale.data.decoding import AudioError, check_name, read_header
from w2vscale.errors import UserError
from w2vscale.files import new_file, writing

SHORTEST_WINDOW = 0.1  # seconds; a recording cut into much shorter ones would fill the disk
FILES_PER_CHUNK = 256  # audio files that one process handles at a time
FILES_PER_CHUNK_OF_SPEECH = 4  # if they are searched for speech

NO_SPEECH = "no speech was found in it"  # why a file is left out


@dataclass(frozen=True)
class Options:
    """How a corpus is prepared. `jobs` and `progress` do not change the result.

    Each file has two steps in `progress`: its header and its cuts.
    """

    channel: int | None = None  # the channel to use, from 0; None: the mean of all
    vad: bool = False  # find the speech in each file
    strict: bool = False  # stop at the first file that cannot be used
    max_bad_fraction: float = 0.05  # stop if more files than this cannot be used
    jobs: int = 1
    progress: Progress = no_progress


DEFAULTS = Options()


def check_segment_seconds(seconds: float | None, *, at_pauses: bool) -> None:
    """Raise UserError if segments must not be that short. `at_pauses`: the pauses between them are left out."""
    least = 2 * SHORTEST if at_pauses else SHORTEST_WINDOW
    if seconds is not None and not least <= seconds < math.inf:
        why = " where recordings are cut at pauses" if at_pauses else ""
        raise UserError(f"--segment-seconds {seconds}: must be at least {least}{why}")


@dataclass
class Cuts:
    """The cuts of some audio files, and what became of the files."""

    lines: list[tuple[int, str, float]] = field(default_factory=list)  # number of the manifest, line, seconds
    used: Counter[str] = field(default_factory=Counter)  # files by suffix
    units: int = 0  # used ones of what `Report.unit` names
    left_out: list[tuple[str, str]] = field(default_factory=list)  # audio files by path, and why
    unusable: list[Unusable] = field(default_factory=list)
    others: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    seconds_of_speech: float = 0.0

    def add(self, which: int, cut: Cut) -> None:
        """Add a cut to manifest number `which`."""
        self.lines.append((which, line_of(cut.to_dict()), cut.duration))


class Text(NamedTuple):
    """What is said in a cut, by whom and in which language."""

    text: str | None = None
    speaker: str | None = None
    language: str | None = None


def write_manifests(
    files: Sequence[str],
    folder: Path,
    output: Path,
    names: Sequence[str],
    cuts_of: Callable[[Sequence[str]], Callable[[Sequence[Header]], Cuts]],
    report: Report,
    options: Options,
    units_of: Callable[[str], int] = lambda file: 1,
) -> Report:
    """Write manifests of `files`, whose paths are absolute or relative to `folder`, and `prepare_report.json`.

    `cuts_of` gets the files that can be read. The function that it returns makes the cuts of some of them, in several
    processes, for the manifests `output`/`cuts_NAME.jsonl`. The headers of the files are kept in `headers.sqlite`, so
    that a later call, or one after a kill, reads only files that are new, unreadable, or have another size or
    modification time. The manifests do not depend on it. `report` has what is known already, and is completed.
    `units_of` is what a file has of `report.unit`: an unusable file loses all of them.

    Raises UserError if too many files are unusable, or the output cannot be written.
    """
    paths = [output / f"cuts_{name}.jsonl" for name in names]
    with writing(paths[0]):
        output.mkdir(parents=True, exist_ok=True)
    with closing(HeaderCache(output / "headers.sqlite", folder)) as cache:
        readable = _read_headers(files, folder, cache, report, options, units_of)
        cache.keep_only(readable)
        with _written_if_refused(report, output):
            used = sum(map(units_of, readable))
            report.check(folder, used, strict=options.strict, limit=options.max_bad_fraction)
            cuts_of_some = cuts_of(readable)
        for path in paths:
            for stale in output.glob(f".{path.name}.*.partial"):  # of a killed call: the cache is locked
                stale.unlink()
        chunks = list(chunked(readable, FILES_PER_CHUNK))
        headers = ([header for file in chunk if (header := cache.get(file))] for chunk in chunks)
        done, counts, seconds = 2 * len(files) - len(readable), [0] * len(paths), [0.0] * len(paths)
        with ExitStack() as stack:
            manifests = [stack.enter_context(new_file(path)) for path in paths]
            found = parallel_map(cuts_of_some, headers, jobs=options.jobs, source=folder)
            for chunk, cuts in zip(chunks, found, strict=True):
                for which, line, duration in cuts.lines:
                    manifests[which].write(line)
                    counts[which] += 1
                    seconds[which] += duration
                report.used += cuts.used
                report.units += cuts.units
                report.left_out += cuts.left_out
                report.unusable += cuts.unusable
                report.others += cuts.others
                report.notes += cuts.notes
                report.seconds += cuts.seconds
                report.seconds_of_speech += cuts.seconds_of_speech
                done += len(chunk)
                options.progress(done, 2 * len(files))
            with _written_if_refused(report, output):
                report.check(folder, report.units, strict=options.strict, limit=options.max_bad_fraction)
    report.manifests = [
        PreparedManifest(path, count, total / 3600) for path, count, total in zip(paths, counts, seconds, strict=True)
    ]
    report.write(output / "prepare_report.json")
    return report


@contextmanager
def _written_if_refused(report: Report, output: Path) -> Iterator[None]:
    """Write the report before a UserError leaves."""
    try:
        yield
    except UserError:
        report.write(output / "prepare_report.json")
        raise


def _read_headers(
    files: Sequence[str],
    folder: Path,
    cache: HeaderCache,
    report: Report,
    options: Options,
    units_of: Callable[[str], int],
) -> list[str]:
    """Update the cache and the report; returns the files that can be read."""
    chunks = list(chunked(files, FILES_PER_CHUNK_OF_SPEECH if options.vad else FILES_PER_CHUNK))
    known = ([(file, cache.get(file)) for file in chunk] for chunk in chunks)
    done, unusable = 0, set[str]()
    read = parallel_map(partial(_changed_headers, folder, options), known, jobs=options.jobs, source=folder)
    for chunk, (headers, bad) in zip(chunks, read, strict=True):
        if headers:
            cache.add(headers)
        report.unusable += [one._replace(units=units_of(one.path)) for one in bad]
        unusable.update(one.path for one in bad)
        report.headers_read += len(headers) + len(bad)
        done += len(chunk)
        options.progress(done, 2 * len(files))
    report.headers_unchanged = len(files) - report.headers_read
    return [file for file in files if file not in unusable]


def _changed_headers(
    folder: Path, options: Options, known: Iterable[tuple[str, Header | None]]
) -> tuple[list[Header], list[Unusable]]:
    """Read the headers of files that differ from the known ones, and why files cannot be used."""
    headers: list[Header] = []
    unusable: list[Unusable] = []
    for file, header in known:
        try:
            status = os.stat(folder / file)
            if header is None or (header.size, header.mtime_ns) != (status.st_size, status.st_mtime_ns):
                header = Header(file, status.st_size, status.st_mtime_ns, *_measured(folder / file))
            elif not options.vad or _speech(header, options.channel) is not None:
                continue
            if options.vad:
                speech = find_speech(folder / file, channel=options.channel)
                header = header._replace(speech=json.dumps({"channel": options.channel, "parts": speech}))
            headers.append(header)
        except FileNotFoundError:
            unusable.append(Unusable(file, "missing", "no such file"))
        except AudioError as error:
            unusable.append(Unusable(file, error.kind, str(error)))
        except OSError as error:
            unusable.append(Unusable(file, "unreadable", f"cannot be read: {error.strerror}"))
    return headers, unusable


def _measured(path: Path) -> tuple[int, int, int]:
    """Sampling rate, channels and samples of a file. Raises AudioError if it cannot be used."""
    check_name(path)
    rate, channels, samples, _ = read_header(path, count=True)
    if samples <= 0:
        raise AudioError("empty", "holds no audio")
    if rate not in SAMPLING_RATES:
        raise AudioError("sampling rate", f"sampling rate is {rate} Hz, not {RATES_IN_WORDS}")
    return rate, channels, samples


def speech_of(header: Header, channel: int | None) -> list[Segment]:
    """The parts of a file that are speech, which `Options.vad` has found."""
    found = _speech(header, channel)
    assert found is not None
    return found


def _speech(header: Header, channel: int | None) -> list[Segment] | None:
    try:
        known = json.loads(header.speech)
        return [Segment(*part) for part in known["parts"]] if known["channel"] == channel else None
    except (ValueError, KeyError, TypeError):
        return None


def whole_file(header: Header, folder: Path, identifier: str, *, channel: int | None = None) -> Cut:
    """The cut of a whole audio file, without supervision. Raises AudioError if it does not have the channel."""
    source = AudioSource("file", channels=[*range(header.channels)], source=str(folder / header.file))
    duration = header.samples / header.sampling_rate
    recording = Recording(identifier, [source], header.sampling_rate, header.samples, duration)
    cut = recording.to_cut()
    if channel is None:
        return cut
    check_channel(header.channels, channel)
    return MonoCut(identifier, start=0.0, duration=duration, channel=channel, recording=recording)


def with_text(cut: Cut, text: Text) -> Cut:
    """A cut with one supervision, which is as long as the cut."""
    recording = cut.recording.id
    supervision = SupervisionSegment(cut.id, recording, 0.0, cut.duration, cut.channel, **text._asdict())
    return fastcopy(cut, supervisions=[supervision])


def part_of(cut: Cut, segment: Segment, identifier: str) -> Cut:
    """A part of a cut without supervisions, under another id."""
    duration = None if segment.end >= cut.duration else segment.end - segment.start
    return cut.truncate(offset=segment.start, duration=duration).with_id(identifier)
