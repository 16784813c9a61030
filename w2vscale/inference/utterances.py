"""Find the utterances in audio files, folders and Lhotse cut manifests, and open their audio."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from lhotse.cut import Cut
from lhotse.utils import compute_num_samples

from w2vscale.corpora.finding import BROKEN_LINK, Unusable, find_audio
from w2vscale.corpora.index import build_index
from w2vscale.data.audio import check_channel, one_channel, read_audio
from w2vscale.data.decoding import AudioError, check_name, is_audio, open_audio, read_header
from w2vscale.data.manifest import Manifest, audio_path
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.resampling import Samples
from w2vscale.data.transcripts import refuse_overhang, transcript
from w2vscale.distributed.process_group import ALONE, Ranks
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import BLOCK_SECONDS, Audio, ChunkFeatures, Pretrained, by_audio

T = TypeVar("T")


@dataclass(frozen=True)
class Utterance:
    """An utterance whose audio has not been opened yet."""

    name: str  # a path relative to an output folder, without suffix
    file: str  # the audio file, for messages
    open: Callable[[], Audio]  # may raise AudioError
    transcript: str = ""
    speaker: str = "unknown"  # the first one that a manifest names
    overhang: AudioError | None = None  # why the transcript is not that of the audio, if it is not
    path: str = ""  # of a file below the folder that was given; empty for an utterance of a manifest
    recording: str = ""  # its longer recording; empty if it is a whole one
    channel: int = 0  # of the recording, from 0
    start: float = 0.0  # in the recording, in seconds

    def bad(self, error: AudioError) -> BadAudio:
        """The record of an utterance whose audio cannot be used."""
        return BadAudio(self.name, self.file, error.kind, str(error))


def find_utterances(paths: Iterable[Path], *, channel: int | None = None) -> list[Utterance]:
    """Find the utterances of audio files, folders of audio files, and manifests.

    The name of a file is its path below the folder without suffix, or that of a file alone its name without suffix.
    Files that would have the same name keep their suffix, and the path that was given if they still do. A folder below
    one of them that cannot be read is an utterance whose audio cannot be opened. `channel` is the channel of files to
    use; None means the mean of all. Raises UserError if a folder contains no audio, a manifest
    is unusable, or an id cannot be a file name.
    """
    found: list[Utterance] = []
    for path in paths:
        if path.is_dir():
            contents = find_audio(path)
            if not contents.audio:
                raise contents.no_audio(path)
            found += [_of_file(path / file.path, file.path, channel) for file in contents.audio]
            broken = [Unusable(file, "missing", why) for file, why in contents.left_out if why == BROKEN_LINK]
            found += [
                Utterance(one.path, str(path / one.path), partial(_refuse, one))
                for one in (*contents.unusable, *broken)
            ]
        elif ".jsonl" in path.suffixes and not is_audio(path.name):
            found += _cut_utterances(path)
        else:
            found.append(_of_file(path, path.name, channel))
    for name_of in (lambda one: one.path, lambda one: os.path.normpath(one.file).lstrip("/.")):
        count = Counter(utterance.name for utterance in found)
        found = [replace(one, name=name_of(one)) if one.path and count[one.name] > 1 else one for one in found]
    return found


def _of_file(path: Path, below: str, channel: int | None) -> Utterance:
    opened = partial(_open_file, path, channel)
    return Utterance(os.path.splitext(below)[0], str(path), opened, path=below, channel=channel or 0)


def _refuse(unusable: Unusable) -> Audio:
    raise AudioError(unusable.kind, unusable.reason)


def utterances_by_name(manifests: Sequence[Path]) -> dict[str, Utterance]:
    """Map names to the utterances of manifests. Raises UserError if a manifest or id is unusable, or an id repeats."""
    found: dict[str, Utterance] = {}
    for path in manifests:
        for utterance in _cut_utterances(path):
            if found.setdefault(utterance.name, utterance) is not utterance:
                raise UserError(
                    f"{path}: the id {utterance.name!r} occurs twice; ids must be unique in all manifests together"
                )
    return found


def _cut_utterances(path: Path) -> Iterator[Utterance]:
    build_index(path)
    manifest = Manifest(path)
    for cut in map(manifest.cut, range(len(manifest))):
        if not _is_file_name(cut.id):
            raise UserError(f"{path}: the id {cut.id!r} cannot be a file name in the output folder")
        speakers = (str(part.speaker) for part in cut.supervisions if part.speaker)
        name, speaker = os.path.normpath(cut.id), next(speakers, "unknown")
        yield Utterance(
            name,
            audio_path(cut),
            partial(_open_cut, cut),
            transcript(cut),
            speaker,
            _overhang(cut),
            recording=cut.recording_id,
            channel=cut.channel if isinstance(cut.channel, int) else 0,
            start=cut.start,
        )


def _overhang(cut: Cut) -> AudioError | None:
    try:
        refuse_overhang(cut)
    except AudioError as error:
        return error
    return None


def _is_file_name(identifier: str) -> bool:
    if "\0" in identifier or identifier.startswith("/"):
        return False
    *folders, name = identifier.split("/")
    return ".." not in folders and name not in ("", ".", "..")


def map_utterances(
    function: Callable[[Utterance, Audio, Iterator[ChunkFeatures]], T],
    pretrained: Pretrained,
    utterances: Iterable[Utterance],
    *,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> Iterator[T | BadAudio]:
    """Call a function with each utterance, its audio, and what `Pretrained.stream` with `settings` computes for it.

    Yields the results, or the record of audio that cannot be used. The shortest utterance comes first, so that
    neighbours share a forward pass. With several ranks, each has every n-th utterance. `progress` is called with
    (seconds of audio done, seconds in total) of this rank.
    """
    opened = []
    for utterance in utterances:
        try:
            opened.append((utterance, utterance.open()))
        except AudioError as error:
            if ranks.is_main:
                yield utterance.bad(error)
    opened = sorted(opened, key=lambda pair: pair[1].seconds)[ranks.rank :: ranks.world_size]
    audios = [audio for _, audio in opened]
    ends = list(accumulate((audio.seconds for audio in audios), initial=0.0))

    def stream() -> Iterator[tuple[int, ChunkFeatures | AudioError]]:
        for number, item in pretrained.stream(audios, **settings):
            yield number, item
            frames = max(pretrained.frames(audios[number]), 1)
            done = frames if isinstance(item, AudioError) else item.first + len(item.hidden[0])
            progress(round(ends[number] + done / frames * audios[number].seconds), round(ends[-1]))

    for number, chunks in by_audio(stream()):
        utterance, audio = opened[number]
        try:
            yield function(utterance, audio, chunks)
        except AudioError as error:
            yield utterance.bad(error)


def collect(results: Iterable[T | BadAudio]) -> tuple[list[T], list[BadAudio]]:
    """Separate the results of `map_utterances` from the records of audio that cannot be used."""
    everything = list(results)
    bad = [one for one in everything if isinstance(one, BadAudio)]
    return [one for one in everything if not isinstance(one, BadAudio)], bad


def _open_file(path: Path, channel: int | None) -> Audio:
    """Open a file. `channel` is the one to use; None means the mean of all."""
    check_name(path)
    header = read_header(path, count=True)
    check_channel(header.channels, channel)

    def blocks() -> Iterator[Samples]:
        done = 0
        with open_audio(path) as decoder:
            while len(block := decoder.read(BLOCK_SECONDS * header.sampling_rate)):
                done += len(block)
                yield one_channel(block, channel)
        if done != header.samples:
            raise AudioError("undecodable", f"cannot be decoded: ends after {done} of {header.samples} samples")

    return Audio(header.sampling_rate, header.samples, blocks)


def _open_cut(cut: Cut) -> Audio:
    rate = cut.sampling_rate
    samples = compute_num_samples(cut.duration, rate)

    def blocks() -> Iterator[Samples]:
        for start in range(0, samples, BLOCK_SECONDS * rate):
            length = min(BLOCK_SECONDS * rate, samples - start)
            yield read_audio(cut, sampling_rate=rate, offset=start, length=length, normalize=False)

    return Audio(rate, samples, blocks)
