"""Utterances to compute something of: audio files, folders of them, Lhotse cut manifests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import soundfile
from lhotse.cut import Cut
from lhotse.utils import compute_num_samples

from w2vscale.corpora.audio_files import AUDIO_SUFFIXES
from w2vscale.corpora.index import build_index
from w2vscale.data.audio import AudioError, libsndfile_reason, read_audio
from w2vscale.data.manifest import Manifest, audio_path
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.resampling import Samples
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import BLOCK_SECONDS, Audio


@dataclass(frozen=True)
class Source:
    """One utterance: its output's path without suffix, below the output folder, and where its audio is from."""

    name: str
    file: str
    open: Callable[[], Audio]
    """May raise AudioError."""


@dataclass(frozen=True)
class CutSource(Source):
    """An utterance of a manifest."""

    cut: Cut


S = TypeVar("S", bound=Source)


def sources_of(path: Path) -> Iterator[Source]:
    """The utterances of a file, a folder or a manifest.

    Raises:
        UserError: a folder without audio, a bad manifest, or an id that is no name for a file.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{path}: no audio in it (looked for {', '.join(sorted(AUDIO_SUFFIXES))})")
        for file in files:
            yield Source(str(file.relative_to(path).with_suffix("")), str(file), partial(_file_audio, file))
    elif ".jsonl" in path.suffixes:
        yield from _cut_sources(path)
    else:
        yield Source(path.stem, str(path), partial(_file_audio, path))


def sources_by_name(manifests: Sequence[Path]) -> dict[str, CutSource]:
    """The utterances of manifests, by their names.

    Raises:
        UserError: a bad manifest, an id that is no name for a file, or a name that two utterances have.
    """
    found: dict[str, CutSource] = {}
    for path in manifests:
        for source in _cut_sources(path):
            if found.setdefault(source.name, source) is not source:
                raise UserError(
                    f"{path}: the id {source.cut.id!r} is another utterance's, too; take the manifests one by one"
                )
    return found


def _cut_sources(path: Path) -> Iterator[CutSource]:
    build_index(path)
    manifest = Manifest(path)
    for cut in map(manifest.cut, range(len(manifest))):
        yield CutSource(_name_of(cut, path), audio_path(cut), partial(_cut_audio, cut), cut)


def _name_of(cut: Cut, manifest: Path) -> str:
    if not _is_name(cut.id):
        raise UserError(f"{manifest}: the id {cut.id!r} is no name for a file below the output folder")
    return os.path.normpath(cut.id)


def _is_name(identifier: object) -> bool:
    if not isinstance(identifier, str) or "\0" in identifier:
        return False
    parts = identifier.split("/")
    return not identifier.startswith("/") and ".." not in parts and parts[-1] not in ("", ".")


def open_by_duration(sources: Sequence[S]) -> tuple[list[tuple[S, Audio]], list[BadAudio]]:
    """Sources that can be opened, by duration, so that neighbours share a forward; and those that cannot."""
    opened: list[tuple[S, Audio]] = []
    bad = []
    for source in sources:
        try:
            opened.append((source, source.open()))
        except AudioError as error:
            bad.append(BadAudio(source.name, source.file, error.kind, str(error)))
    return sorted(opened, key=lambda pair: pair[1].samples / pair[1].sampling_rate), bad


def _file_audio(path: Path) -> Audio:
    """A whole file, channels averaged; read from its beginning, since positions in MP3 or Opus are not exact."""
    if not path.is_file():
        raise AudioError("missing", "no such file")
    try:
        header = soundfile.info(str(path))
    except Exception as error:
        raise AudioError("undecodable", f"not readable as audio: {libsndfile_reason(error)}") from None

    def blocks() -> Iterator[Samples]:
        done = 0
        try:
            with path.open("rb") as stored, soundfile.SoundFile(stored) as file:
                while (block := file.read(BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)).size:
                    done += len(block)
                    # The length of an MP3 without a header is a guess; its frames begin with eleven ones.
                    if header.format == "MP3" and done == header.frames and stored.read(2) >= b"\xff\xe0":
                        raise AudioError("undecodable", f"goes on after the {done} samples that it seems to have")
                    yield block.mean(axis=1)
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioError("undecodable", f"cannot be decoded: {libsndfile_reason(error)}") from None
        if done != header.frames:
            raise AudioError("undecodable", f"cannot be decoded: ends after {done} of {header.frames} samples")

    return Audio(header.samplerate, header.frames, blocks)


def _cut_audio(cut: Cut) -> Audio:
    rate = cut.sampling_rate
    samples = compute_num_samples(cut.duration, rate)

    def blocks() -> Iterator[Samples]:
        for start in range(0, samples, BLOCK_SECONDS * rate):
            length = min(BLOCK_SECONDS * rate, samples - start)
            yield read_audio(cut, sampling_rate=rate, offset=start, length=length, normalize=False)

    return Audio(rate, samples, blocks)
