"""Prepare manifests of any folder of audio files."""

from __future__ import annotations

import math
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from lhotse.cut import Cut

from w2vscale.corpora.finding import AudioFile, Unusable, find_audio
from w2vscale.corpora.header_cache import Header
from w2vscale.corpora.kaldi import read_phrases
from w2vscale.corpora.manifests import existing_folder
from w2vscale.corpora.preparing import (
    DEFAULTS,
    Cuts,
    Options,
    Text,
    check_segment_seconds,
    part_of,
    speech_of,
    whole_file,
    with_text,
    write_manifests,
)
from w2vscale.corpora.report import Report
from w2vscale.corpora.segments import (
    BEYOND_SEGMENT,
    Segment,
    Timed,
    near_to,
    segments_of_speech,
    windows,
    words_of,
)
from w2vscale.corpora.text_files import text_of_file
from w2vscale.corpora.timed_text import check_encoding, read_timed
from w2vscale.data.decoding import AudioError
from w2vscale.errors import UserError

LONGEST_OF_SPEECH = 30.0  # seconds of a segment with --vad and without --segment-seconds
START_AFTER_AUDIO = 1.0  # seconds after the end of a recording in which a word may begin

WITHOUT_TIMES = "segments without text, because the transcript of their recording has no times"
OVERHANGING = "segments without text, because a word or phrase of it extends beyond the segment"
OUTSIDE = "words or phrases in no segment, because no speech was found there or the recording ends before"
NOT_A_TRANSCRIPT = "JSON files beside audio without words and times, which are not used as transcripts"
SAME_NAME = "audio files that share their name with another one or its segments, so that their ids are their paths"
NO_SPEECH = "no speech was found in it"
NOT_AMONG = "recordings in the file `segments` that are not among the audio files"
AMBIGUOUS = (
    "recordings in the file `segments` that may be several audio files; use their paths, such as a-talk for a/talk"
)
MIXED_CHANNELS = "recordings with the words of several channels mixed by time"
OTHER_CHANNELS = "recordings without text, because the words in their transcript are all of other channels"


class TranscriptError(UserError):
    """A transcript cannot be used. `path` is below the folder; the message is the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


@dataclass(frozen=True)
class Folder:
    """What all processes know of a folder that is prepared."""

    path: Path
    texts: dict[str, AudioFile]  # audio files with a transcript beside them, by their path
    names: dict[str, str]  # ids of the files that share their name with another file
    phrases: dict[str, list[Timed]]  # of Kaldi's files `segments` and `text` in this folder, by audio file
    options: Options
    segment_seconds: float | None = None
    language: str | None = None
    encoding: str | None = None
    validation_limit: float = 0.0


def prepare_folder(
    audio: Path,
    output: Path,
    *,
    segment_seconds: float | None = None,
    validation_share: float = 0.0,
    language: str | None = None,
    encoding: str | None = None,
    options: Options = DEFAULTS,
) -> Report:
    """Write `cuts_train.jsonl`, and `cuts_validation.jsonl` if wanted, for all audio files below a folder.

    The folder of a file is its speaker; `language` is that of all. A transcript has the name of its audio file: .txt,
    or with times .ctm, .TextGrid, .srt, .vtt or .json; `encoding` is theirs if it is not Unicode. `segment_seconds`
    splits longer recordings, and with `options.vad` the pauses between segments are left out. A segment gets the words
    that are said in it; if the transcript has no times, it gets no text. `validation_share` is a fraction of the
    recordings, chosen by a hash of their names.

    What is not used is in the report, which `output`/prepare_report.json has, too. Raises UserError like
    `write_manifests`, or if there is no audio or an option is out of range.
    """
    audio = existing_folder(audio)
    if not 0.0 <= validation_share < 1.0:
        raise UserError(f"--validation-share {validation_share}: must be at least 0 and below 1")
    check_segment_seconds(segment_seconds, at_pauses=options.vad)
    if encoding is not None:
        check_encoding(encoding)
    found = find_audio(audio)
    if not found.audio:
        raise found.no_audio(audio)
    files = [file.path for file in found.audio]
    names = _names_of_twins(files, in_segments=options.vad or segment_seconds is not None)
    report = Report(unusable=found.unusable, others=found.others, left_out=found.left_out)
    report.notes[SAME_NAME] += len(names)
    phrases = _by_file(read_phrases(audio, encoding=encoding, notes=report.notes), files, report.notes)
    folder = Folder(
        path=audio,
        texts={file.path: file for file in found.audio if file.text},
        names=names,
        phrases=phrases,
        options=options,
        segment_seconds=segment_seconds,
        language=language,
        encoding=encoding,
    )

    def cuts_of(readable: Sequence[str]) -> Callable[[Sequence[Header]], Cuts]:
        return partial(_cuts_of, replace(folder, validation_limit=_validation_limit(readable, validation_share)))

    splits = ["train", "validation"][: 2 if validation_share else 1]
    if not validation_share and (stale := output / "cuts_validation.jsonl").exists():
        raise UserError(f"{stale}: is from an earlier call with --validation-share; delete it, or choose another OUT")
    return write_manifests(files, audio, output, splits, cuts_of, report, options)


def identifier_of(file: str) -> str:
    """The id of an audio file, from its path below the folder."""
    return os.path.splitext(file)[0].replace("/", "-")


def _by_file(phrases: dict[str, list[Timed]], files: Sequence[str], notes: Counter[str]) -> dict[str, list[Timed]]:
    """The phrases of each audio file. The recordings of others, and those that may be several files, are counted.

    A recording has the id of its file, or the name of its file without the folder if no other file has it.
    """
    of_id, of_name = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for file in files if phrases else ():
        of_id[identifier_of(file)].append(file)
        of_name[identifier_of(os.path.basename(file))].append(file)
    by_id, by_name = dict[str, list[Timed]](), dict[str, list[Timed]]()
    for recording, units in phrases.items():
        matching = of_id.get(recording) or of_name.get(recording) or []
        if len(matching) == 1:
            (by_id if recording in of_id else by_name)[matching[0]] = units
        else:
            notes[AMBIGUOUS if matching else NOT_AMONG] += 1
    notes[NOT_AMONG] += len(by_id.keys() & by_name.keys())  # another recording has the id of the file
    return {**by_name, **by_id}


def _names_of_twins(files: Sequence[str], *, in_segments: bool) -> dict[str, str]:
    """The ids of files that would share theirs with another file, or with a segment of it: they keep the suffix."""
    count = Counter(map(identifier_of, files))

    def shared(identifier: str) -> bool:
        recording, _, number = identifier.rpartition("-")
        return count[identifier] > 1 or (
            in_segments and recording in count and number.isdecimal() and number == str(int(number))
        )

    twins = {file: file.replace("/", "-") for file in files if shared(identifier_of(file))}
    for name, times in Counter(twins.values()).items():
        if times > 1 or name in count:
            file = next(file for file in twins if twins[file] == name)
            raise UserError(f"{file}: its id, {name}, is also that of another file; rename one of them")
    return twins


def _hash(identifier: str) -> int:
    return zlib.crc32(identifier.encode(errors="surrogateescape"))


def _validation_limit(files: Sequence[str], share: float) -> float:
    """Recordings whose hash is below this limit are for validation.

    With a limit, a file that is added later does not move other files. Small corpora hold out at least one recording.
    """
    if not share:
        return 0
    hashes = np.fromiter((_hash(identifier_of(file)) for file in files), np.int64, len(files))
    limit = max(share * 2**32, int(hashes.min()) + 1)
    if (hashes < limit).all():
        raise UserError(f"--validation-share {share}: leaves no recording for training (number of files: {len(files)})")
    return limit


def _cuts_of(folder: Folder, headers: Sequence[Header]) -> Cuts:
    """The cuts of some files."""
    found = Cuts()
    for header in headers:
        try:
            cuts = _cuts_of_file(folder, header, found)
        except AudioError as error:
            found.unusable.append(Unusable(header.file, error.kind, str(error)))
            continue
        except TranscriptError as error:
            found.unusable.append(Unusable(error.path, "transcript", f"{error}; its audio is left out"))
            continue
        if folder.options.vad:
            found.seconds += header.samples / header.sampling_rate
            found.seconds_of_speech += sum(end - start for start, end in speech_of(header, folder.options.channel))
        suffix = os.path.splitext(header.file)[1].lower()
        if not cuts:
            found.others[suffix, NO_SPEECH] += 1
            found.left_out.append((header.file, NO_SPEECH))
            continue
        held_out = _hash(identifier_of(header.file)) < folder.validation_limit
        for cut in cuts:
            found.add(held_out, cut)
        found.used[suffix] += 1
        found.units += 1
    return found


def _cuts_of_file(folder: Folder, header: Header, notes: Cuts) -> list[Cut]:
    """The cuts of one file; what is worth knowing is added to `notes`.

    Raises AudioError if the audio cannot be used, and TranscriptError if the transcript cannot.
    """
    channel = folder.options.channel
    identifier = folder.names.get(header.file) or identifier_of(header.file)
    whole = whole_file(header, folder.path, identifier, channel=channel)
    speaker = os.path.dirname(header.file) or None
    units, text = _transcript(folder, header.file, whole.duration, notes)
    units = _in_channel(units, header.channels, channel, notes) if units else units
    segments = _segments(folder, header, whole.duration, units)
    if segments is None:
        return [with_text(whole, Text(text if units is None else _joined(units), speaker, folder.language))]
    texts = _texts_of_segments(segments, whole.duration, units, text, notes)
    return [
        with_text(part_of(whole, segment, f"{identifier}-{number}"), Text(words, speaker, folder.language))
        for number, (segment, words) in enumerate(zip(segments, texts, strict=True))
    ]


def _texts_of_segments(
    segments: Sequence[Segment], duration: float, units: Sequence[Timed] | None, text: str | None, notes: Cuts
) -> list[str | None]:
    """What is said in each segment of a recording, as far as it is known. `text` is the transcript without times."""
    if units is None:
        if len(segments) == 1:  # it has all of the speech
            return [text]
        notes.notes[WITHOUT_TIMES] += len(segments) if text else 0
        return [None] * len(segments)
    texts: list[str | None] = []
    outside, near = len(units), near_to(units)
    for start, end in segments:
        # Times are inexact: the last word may end after the recording.
        segment = Segment(start, end if end < duration else duration + BEYOND_SEGMENT)
        words, partly = words_of(segment, near(segment))
        outside -= len(words)
        notes.notes[OVERHANGING] += bool(partly)
        texts.append(None if partly else _joined(words))
    notes.notes[OUTSIDE] += outside
    return texts


def _segments(folder: Folder, header: Header, duration: float, units: Sequence[Timed] | None) -> list[Segment] | None:
    """The parts to cut a file into; None if it stays whole."""
    longest = folder.segment_seconds
    if not folder.options.vad:
        if longest is None or duration <= longest:
            return None
        segments = windows(duration, longest, units or ())
        return [one for one in segments if (one.end - one.start) * header.sampling_rate >= 1.0]
    return segments_of_speech(speech_of(header, folder.options.channel), duration, longest or LONGEST_OF_SPEECH)


def _joined(units: Sequence[Timed]) -> str | None:
    """The text of some words or phrases; None if that of one is unknown."""
    texts = [unit.text for unit in units]
    return None if None in texts else " ".join(filter(None, texts))


def _transcript(folder: Folder, file: str, duration: float, notes: Cuts) -> tuple[Sequence[Timed] | None, str | None]:
    """The words of a file with their times, or else its text, if it has any. Raises TranscriptError."""
    stem = os.path.splitext(file)[0]
    if file in folder.phrases:
        phrases = _checked(folder.phrases[file], duration, "segments")
        ends = (max(one.start, duration) if one.end == math.inf else one.end for one in phrases)
        return [one._replace(end=end) for one, end in zip(phrases, ends, strict=True)], None
    beside = folder.texts.get(file, AudioFile(file))
    for suffix in filter(None, (beside.text, beside.untimed)):
        path = f"{stem}{suffix}"
        try:
            if suffix.lower() == ".txt":
                return None, text_of_file(folder.path / path, encoding=folder.encoding).strip()
            units = read_timed(folder.path / path, encoding=folder.encoding, notes=notes.notes)
        except UserError as error:
            raise TranscriptError(path, str(error).removeprefix(f"{folder.path / path}: ")) from None
        if units is not None:
            return _checked(units, duration, path), None
        notes.notes[NOT_A_TRANSCRIPT] += 1
    return None, None


def _in_channel(units: Sequence[Timed], channels: int, channel: int | None, notes: Cuts) -> Sequence[Timed] | None:
    """The words that are said in the channel that is used of `channels`; None if those of others alone are known."""
    if channel is None or channels == 1:
        notes.notes[MIXED_CHANNELS] += len({unit.channel for unit in units} - {None}) > 1
        return units
    found = [unit for unit in units if unit.channel in (None, channel)]
    notes.notes[OTHER_CHANNELS] += not found
    return found or None


def _checked(units: Sequence[Timed], duration: float, path: str) -> Sequence[Timed]:
    """The same words. Raises TranscriptError if one begins after the end of the recording."""
    if units and units[-1].start > duration + START_AFTER_AUDIO:
        raise TranscriptError(path, f"has words at {units[-1].start:.1f} s, but the audio ends at {duration:.1f} s")
    return units
