"""Hidden states of audio files, folders and manifests, as .npy or safetensors files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from lhotse.cut import Cut
from lhotse.utils import compute_num_samples

from w2vscale.data.audio import AudioError, libsndfile_reason, read_audio
from w2vscale.data.journal import writing
from w2vscale.data.manifest import Manifest, audio_path, build_index
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.prepare import AUDIO_SUFFIXES
from w2vscale.errors import UserError
from w2vscale.evaluation.pretrained import (
    BATCH_SECONDS,
    BLOCK_SECONDS,
    CHUNK_SECONDS,
    OVERLAP_SECONDS,
    Audio,
    Piece,
    Pretrained,
    Samples,
)

FORMATS = ("npy", "safetensors")


@dataclass(frozen=True)
class Source:
    """One utterance: its output's path without suffix, below the output folder, and where its audio is from."""

    name: str
    file: str
    open: Callable[[], Audio]
    """May raise AudioError."""


@dataclass(frozen=True)
class WrittenFeatures:
    """What was written, and which audio could not be used."""

    files: int
    frames: int
    layers: list[int]
    bad: list[BadAudio]


def write_features(
    pretrained: Pretrained,
    audio: Sequence[Path],
    output: Path,
    *,
    layers: Iterable[int] | None = None,
    form: str = "npy",
    chunk_seconds: float = CHUNK_SECONDS,
    overlap_seconds: float = OVERLAP_SECONDS,
    batch_seconds: float = BATCH_SECONDS,
    progress: Callable[[int, int], None] | None = None,
) -> WrittenFeatures:
    """Write one file of hidden states, fp32, for each utterance of `audio`: files, folders, Lhotse cut manifests.

    A file's features go to `output/STEM.npy`, those of a folder's files to their paths below it, those of a cut to its
    id. npy: [layers, frames, dim], layers ascending, or [frames, dim] of a single layer. safetensors: `layer_N`
    [frames, dim]. Existing files are replaced; a file appears whole or not at all. For the layers and the chunks see
    `Pretrained.features`. Memory does not depend on the length of audio. `progress` is called with (seconds of audio
    done, seconds in all).

    Audio that cannot be used is left out and named in the result.

    Raises:
        UserError: a folder without audio or a bad manifest, two utterances of one name, a setting that the model does
            not take, or an output that cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    wanted = pretrained.checked_layers(layers)
    sources = [source for path in audio for source in _sources(path)]
    _refuse_clashes(sources, output)
    opened, bad = _opened(sources)
    seconds = [one.samples / one.sampling_rate for _, one in opened]
    ends = list(accumulate(seconds))
    written, frames = 0, 0
    stream = pretrained.stream(
        [one for _, one in opened],
        layers=wanted,
        chunk_seconds=chunk_seconds,
        overlap_seconds=overlap_seconds,
        batch_seconds=batch_seconds,
    )
    file: _FeatureFile | None = None
    try:
        for number, piece in stream:
            source, one = opened[number]
            done = ends[number]
            if isinstance(piece, AudioError):
                bad.append(BadAudio(source.name, source.file, piece.kind, str(piece)))
                if file is not None:
                    file.discard()
                    file = None
            else:
                count = pretrained.frames(one)
                if file is None:
                    file = _FeatureFile(output / f"{source.name}.{form}", wanted, count, pretrained.config.model.dim)
                if file.write(piece):
                    file = None
                    written += 1
                    frames += count
                done -= seconds[number] * (1 - (piece.first + piece.hidden[0].shape[0]) / count)
            if progress is not None:
                progress(round(done), round(ends[-1]))
    finally:
        if file is not None:
            file.discard()
    return WrittenFeatures(written, frames, wanted, bad)


def _sources(path: Path) -> Iterator[Source]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{path}: no audio in it (looked for {', '.join(sorted(AUDIO_SUFFIXES))})")
        for file in files:
            yield Source(str(file.relative_to(path).with_suffix("")), str(file), partial(_file_audio, file))
    elif ".jsonl" in path.suffixes:
        build_index(path)
        manifest = Manifest(path)
        for number in range(len(manifest)):
            cut = manifest.cut(number)
            if not _is_name(cut.id):
                raise UserError(f"{path}: the id {cut.id!r} is no name for a file below the output folder")
            yield Source(os.path.normpath(cut.id), audio_path(cut), partial(_cut_audio, cut))
    else:
        yield Source(path.stem, str(path), partial(_file_audio, path))


def _is_name(identifier: object) -> bool:
    if not isinstance(identifier, str) or "\0" in identifier:
        return False
    parts = identifier.split("/")
    return not identifier.startswith("/") and ".." not in parts and parts[-1] not in ("", ".")


def _refuse_clashes(sources: Sequence[Source], output: Path) -> None:
    seen: dict[str, Source] = {}
    for source in sources:
        other = seen.setdefault(source.name, source)
        if other is not source:
            raise UserError(f"{source.file}: its features would be {output / source.name}, as those of {other.file}")


def _opened(sources: Sequence[Source]) -> tuple[list[tuple[Source, Audio]], list[BadAudio]]:
    """Sources that can be opened, by duration, so that neighbours share a forward; and those that cannot."""
    opened: list[tuple[Source, Audio]] = []
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


class _FeatureFile:
    """A file of hidden states that is written piece by piece, and gets its name once it is complete.

    In both formats the layers follow each other, each a whole array, after a header.
    """

    def __init__(self, path: Path, layers: Sequence[int], frames: int, dim: int) -> None:
        self.path, self.frames, self.dim = path, frames, dim
        self.partial = path.with_name(f".{path.name}.partial")
        header = _npy_header if path.suffix == ".npy" else _safetensors_header
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file: BinaryIO = self.partial.open("wb")
            self.file.write(header(layers, frames, dim))
        self.start = self.file.tell()

    def write(self, piece: Piece) -> bool:
        """Write a piece; True if it was the last."""
        with writing(self.path):
            for number, hidden_TD in enumerate(piece.hidden):
                self.file.seek(self.start + 4 * self.dim * (number * self.frames + piece.first))
                self.file.write(hidden_TD.contiguous().numpy().astype("<f4", copy=False).data)
            if piece.first + piece.hidden[0].shape[0] < self.frames:
                return False
            self.file.close()
            self.partial.replace(self.path)
        return True

    def discard(self) -> None:
        """Remove what was written."""
        with suppress(OSError):
            self.file.close()
            self.partial.unlink(missing_ok=True)


def _npy_header(layers: Sequence[int], frames: int, dim: int) -> bytes:
    shape = (frames, dim) if len(layers) == 1 else (len(layers), frames, dim)
    out = BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return out.getvalue()


def _safetensors_header(layers: Sequence[int], frames: int, dim: int) -> bytes:
    size = 4 * frames * dim
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for number, layer in enumerate(layers):
        offsets = [number * size, (number + 1) * size]
        entries[f"layer_{layer}"] = {"dtype": "F32", "shape": [frames, dim], "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    return struct.pack("<Q", len(text)) + text
