"""Prepare manifests of a corpus that lists its utterances: file, times, text, speaker and language."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lhotse.cut import Cut

from w2vscale.corpora.finding import Unusable
from w2vscale.corpora.header_cache import Header
from w2vscale.corpora.kaldi import WITHOUT_TEXT
from w2vscale.corpora.preparing import NO_SPEECH, Cuts, Options, Text, part_of, whole_file, with_text, write_manifests
from w2vscale.corpora.report import Report
from w2vscale.corpora.segments import Segment, segments_of_speech
from w2vscale.data.decoding import AudioError
from w2vscale.errors import UserError

SHORTEST_UTTERANCE = 0.001  # seconds
END_AFTER_AUDIO = 0.1  # seconds by which a listed utterance may end after its audio

EMPTY_TEXT = "utterances with an empty transcript"
SPEECH_AFTER_AUDIO = "recordings whose listed speech goes on after their audio ends, where it is cut"


class Utterance(NamedTuple):
    """An utterance in an audio file. `duration` None means up to the end of the file."""

    part: str  # of the corpus: each becomes a manifest
    identifier: str
    text: Text = Text()
    start: float = 0.0  # seconds
    duration: float | None = None
    channel: int | None = None  # None: as in `Options`
    samples: int | None = None  # of the file, as the listing says


@dataclass
class Recording:
    """An audio file of a listing. With `speech`, it is cut into segments of that speech instead of its utterances."""

    identifier: str
    utterances: list[Utterance] = field(default_factory=list)
    speech: list[Segment] | None = None


@dataclass
class Listing:
    """The utterances of a corpus, by the path of their audio file: absolute, or relative to `folder`."""

    folder: Path
    recordings: dict[str, Recording] = field(default_factory=dict)
    unusable: list[Unusable] = field(default_factory=list)
    others: Counter[tuple[str, str]] = field(default_factory=Counter)  # files that are not used, by suffix and reason
    left_out: list[tuple[str, str]] = field(default_factory=list)  # audio files among them by path, and why
    notes: Counter[str] = field(default_factory=Counter)
    longest: float = 30.0  # seconds of a segment of speech
    _times: Counter[tuple[str, str]] = field(default_factory=Counter)  # by part and id

    def add(self, file: str, utterance: Utterance, *, recording: str | None = None) -> None:
        """Add an utterance of an audio file. A second one with the same id in a part is unusable."""
        self._times[utterance[:2]] += 1
        if self._times[utterance[:2]] > 1:
            reason = f"the id {utterance.identifier} occurs twice"
            self.unusable.append(Unusable(file, "repeated", reason))
            return
        self.notes[EMPTY_TEXT] += utterance.text.text == ""
        name = recording or os.path.splitext(os.path.basename(file))[0]
        self.recordings.setdefault(file, Recording(name)).utterances.append(utterance)

    def new_name(self, part: str, name: str) -> str:
        """`name`, with a number if an utterance of this part has it already."""
        while (times := self._times[part, name]) > 0:
            self._times[part, name] += 1
            name = f"{name}-{times}"
        return name


def prepare_listing(listing: Listing, output: Path, parts: Sequence[str], options: Options) -> Report:
    """Write `cuts_PART.jsonl` for each part of a corpus, in the order of its utterances' ids.

    Audio that cannot be used, and utterances that end after their audio, are left out and reported. Raises UserError
    like `write_manifests`, or if there is no utterance.
    """
    if not listing.recordings:
        reason = f"; {listing.unusable[0].path}: {listing.unusable[0].reason}" if listing.unusable else ""
        raise UserError(f"{listing.folder}: no utterance in it{reason}")
    files = sorted(listing.recordings, key=lambda file: listing.recordings[file].utterances[0].identifier)
    report = Report(
        unit="utterance",
        unusable=listing.unusable,
        others=listing.others,
        left_out=listing.left_out,
        notes=listing.notes,
    )
    texts = [one.text.text for recording in listing.recordings.values() for one in recording.utterances]
    if any(text is not None for text in texts):
        listing.notes[WITHOUT_TEXT] = texts.count(None)
    numbers = {part: number for number, part in enumerate(parts)}
    cuts_of = partial(_cuts_of, listing, numbers, options)

    def utterances_of(file: str) -> int:
        return len(listing.recordings[file].utterances)

    return write_manifests(
        files, listing.folder, output, parts, lambda readable: cuts_of, report, options, utterances_of
    )


def _cuts_of(listing: Listing, numbers: dict[str, int], options: Options, headers: Sequence[Header]) -> Cuts:
    """The cuts of some files."""
    found = Cuts()
    for header in headers:
        recording, used = listing.recordings[header.file], 0
        suffix = os.path.splitext(header.file)[1].lower()
        end = max((part.end for part in recording.speech or ()), default=0.0)
        found.notes[SPEECH_AFTER_AUDIO] += end > header.samples / header.sampling_rate + END_AFTER_AUDIO
        for utterance in recording.utterances:
            try:
                cuts = _cuts_of_utterance(listing, header, utterance, recording, options)
            except AudioError as error:
                found.unusable.append(Unusable(header.file, error.kind, str(error)))
                continue
            if not cuts:
                found.others[suffix, NO_SPEECH] += 1
                found.left_out.append((header.file, NO_SPEECH))
                continue
            for cut in cuts:
                found.add(numbers[utterance.part], cut)
            used += 1
        found.units += used
        found.used[suffix] += used > 0
    return found


def _cuts_of_utterance(
    listing: Listing, header: Header, utterance: Utterance, recording: Recording, options: Options
) -> list[Cut]:
    """The cut of an utterance, or those of the speech in it. Raises AudioError if it is not in the audio."""
    channel = options.channel if utterance.channel is None else utterance.channel
    whole = whole_file(header, listing.folder, recording.identifier, channel=channel)
    if utterance.samples is not None and utterance.samples != header.samples:
        reason = f"has {header.samples} samples, but its list says {utterance.samples}"
        raise AudioError("mismatched", reason)
    if recording.speech is not None:
        speech = [Segment(start, min(end, whole.duration)) for start, end in recording.speech if start < whole.duration]
        segments = segments_of_speech(speech, whole.duration, listing.longest)
        names = (f"{utterance.identifier}-{number}" for number in range(len(segments)))
        return [with_text(part_of(whole, *part), utterance.text) for part in zip(segments, names, strict=True)]
    end = whole.duration if utterance.duration is None else utterance.start + utterance.duration
    if not 0.0 <= utterance.start <= end - SHORTEST_UTTERANCE:
        raise AudioError("mismatched", f"{utterance.identifier} lasts from {utterance.start:g} to {end:g} s")
    if end > whole.duration + END_AFTER_AUDIO:
        reason = f"{utterance.identifier} ends at {end:.2f} s, but the audio ends at {whole.duration:.2f} s"
        raise AudioError("mismatched", reason)
    if utterance.start == 0.0 and end > whole.duration - END_AFTER_AUDIO:  # lists round the duration of a file
        return [with_text(whole.with_id(utterance.identifier), utterance.text)]
    return [with_text(part_of(whole, Segment(utterance.start, end), utterance.identifier), utterance.text)]
