"""Prepare manifests of any folder of audio files."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from lhotse.cut import Cut

from w2vscale.corpora.finding import NOT_AUDIO, TRANSCRIPT, Unusable, find_audio, identifier_of
from w2vscale.corpora.folder_texts import TranscriptError, Transcripts
from w2vscale.corpora.header_cache import Header
from w2vscale.corpora.manifests import existing_folder
from w2vscale.corpora.preparing import (
    DEFAULTS,
    NO_SPEECH,
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
from w2vscale.corpora.segments import Segment, Timed, segments_of_speech, windows
from w2vscale.data.decoding import AudioError
from w2vscale.errors import UserError

LONGEST_OF_SPEECH = 30.0  # seconds of a segment with --vad and without --segment-seconds

SAME_NAME = "audio files that share their name with another one or its segments, so that their ids are their paths"


@dataclass(frozen=True)
class Folder:
    """What all processes know of a folder that is prepared."""

    path: Path
    transcripts: Transcripts
    names: dict[str, str]  # ids of the files that share their name with another file
    options: Options
    segment_seconds: float | None = None
    language: str | None = None
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
    found = find_audio(audio)
    if not found.audio:
        raise found.no_audio(audio)
    files = [file.path for file in found.audio]
    names = _names_of_twins(files, in_segments=options.vad or segment_seconds is not None)
    report = Report(unusable=found.unusable, others=found.others, left_out=found.left_out)
    report.notes[SAME_NAME] += len(names)
    transcripts = Transcripts.find(audio, found.audio, report.notes, encoding=encoding)
    if transcripts.phrases:
        report.others.subtract({("(no suffix)", NOT_AUDIO): 2})
        report.others["(no suffix)", TRANSCRIPT] += 2  # `segments` and `text`
    folder = Folder(
        path=audio,
        transcripts=transcripts,
        names=names,
        options=options,
        segment_seconds=segment_seconds,
        language=language,
    )

    def cuts_of(readable: Sequence[str]) -> Callable[[Sequence[Header]], Cuts]:
        for one in report.unusable:
            report.others.update(transcripts.left_out_with(one.path))
        return partial(_cuts_of, replace(folder, validation_limit=_validation_limit(readable, validation_share)))

    splits = ["train", "validation"][: 2 if validation_share else 1]
    if not validation_share and (stale := output / "cuts_validation.jsonl").exists():
        raise UserError(f"{stale}: is from an earlier call with --validation-share; delete it, or choose another OUT")
    return write_manifests(files, audio, output, splits, cuts_of, report, options)


def _names_of_twins(files: Sequence[str], *, in_segments: bool) -> dict[str, str]:
    """The ids of files that would share theirs with another file, or with a segment of it: they keep the suffix.

    Where that is the id of another file, too, as for a-b.wav and a/b.wav, a hash of the path follows.
    """
    count = Counter(map(identifier_of, files))

    def shared(identifier: str) -> bool:
        recording, _, number = identifier.rpartition("-")
        return count[identifier] > 1 or (
            in_segments and recording in count and number.isdecimal() and number == str(int(number))
        )

    twins = {file: file.replace("/", "-") for file in files if shared(identifier_of(file))}
    taken = count + Counter(twins.values())
    return {file: name if taken[name] == 1 else f"{name}-{_hash(file):08x}" for file, name in twins.items()}


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
            cuts, texts = _cuts_of_file(folder, header, found)
        except (AudioError, TranscriptError) as error:
            kind = error.kind if isinstance(error, AudioError) else "transcript"
            found.unusable.append(Unusable(header.file, kind, str(error)))
            found.others.update(folder.transcripts.left_out_with(header.file))
            continue
        if folder.options.vad:
            found.seconds += header.samples / header.sampling_rate
            found.seconds_of_speech += sum(end - start for start, end in speech_of(header, folder.options.channel))
        suffix = os.path.splitext(header.file)[1].lower()
        if not cuts:
            found.others[suffix, NO_SPEECH] += 1
            found.others.update(folder.transcripts.left_out_with(header.file))
            found.left_out.append((header.file, NO_SPEECH))
            continue
        found.others.update(texts)
        held_out = _hash(identifier_of(header.file)) < folder.validation_limit
        for cut in cuts:
            found.add(held_out, cut)
        found.used[suffix] += 1
        found.units += 1
    return found


def _cuts_of_file(folder: Folder, header: Header, notes: Cuts) -> tuple[list[Cut], Sequence[tuple[str, str]]]:
    """The cuts of one file, and what became of the files beside it; what is worth knowing is added to `notes`.

    Raises AudioError if the audio cannot be used, and TranscriptError if the transcript cannot.
    """
    channel, name = folder.options.channel, header.file
    identifier = folder.names.get(name) or identifier_of(name)
    whole = whole_file(header, folder.path, identifier, channel=channel)
    said = folder.transcripts.of(name, whole.duration, notes.notes, channels=header.channels, channel=channel)
    speaker = os.path.dirname(name) or None
    segments = _segments(folder, header, whole.duration, said.units)
    if segments is None:
        return [with_text(whole, Text(said.whole(), speaker, folder.language))], said.files
    texts = said.of_segments(segments, notes.notes)
    return [
        with_text(part_of(whole, segment, f"{identifier}-{number}"), Text(words, speaker, folder.language))
        for number, (segment, words) in enumerate(zip(segments, texts, strict=True))
    ], said.files


def _segments(folder: Folder, header: Header, duration: float, units: Sequence[Timed] | None) -> list[Segment] | None:
    """The parts to cut a file into; None if it stays whole."""
    longest = folder.segment_seconds
    if not folder.options.vad:
        if longest is None or duration <= longest:
            return None
        segments = windows(duration, longest, units or ())
        return [one for one in segments if (one.end - one.start) * header.sampling_rate >= 1.0]
    return segments_of_speech(speech_of(header, folder.options.channel), duration, longest or LONGEST_OF_SPEECH)
