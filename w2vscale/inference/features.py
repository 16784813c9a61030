"""Hidden states of audio files, folders and manifests, as .npy or safetensors files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from w2vscale.data.audio import AudioError
from w2vscale.data.micro_batch import BadAudio
from w2vscale.errors import UserError
from w2vscale.files import writing
from w2vscale.inference.pretrained import BATCH_SECONDS, CHUNK_SECONDS, OVERLAP_SECONDS, Piece, Pretrained
from w2vscale.inference.sources import Source, open_by_duration, sources_of

FORMATS = ("npy", "safetensors")


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
    sources = [source for path in audio for source in sources_of(path)]
    _refuse_clashes(sources, output)
    opened, bad = open_by_duration(sources)
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


def _refuse_clashes(sources: Sequence[Source], output: Path) -> None:
    seen: dict[str, Source] = {}
    for source in sources:
        other = seen.setdefault(source.name, source)
        if other is not source:
            raise UserError(f"{source.file}: its features would be {output / source.name}, as those of {other.file}")


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
