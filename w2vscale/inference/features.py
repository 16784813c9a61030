"""Write hidden states of audio files, folders and manifests to .npy or safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from w2vscale.data.micro_batch import BadAudio
from w2vscale.errors import UserError
from w2vscale.files import new_file, safetensors_header
from w2vscale.inference.pretrained import (
    BATCH_SECONDS,
    CHUNK_SECONDS,
    OVERLAP_SECONDS,
    Audio,
    ChunkFeatures,
    Pretrained,
)
from w2vscale.inference.utterances import Utterance, collect, find_utterances, map_utterances

FORMATS = ("npy", "safetensors")


@dataclass(frozen=True)
class WrittenFeatures:
    """How much was written, and which audio could not be used."""

    files: int
    frames: int
    layers: list[int]
    bad: list[BadAudio]


def check_format(file_format: str) -> None:
    """Raise UserError if features cannot be written in this format."""
    if file_format not in FORMATS:
        raise UserError(f"--format {file_format}: choose one of {', '.join(FORMATS)}")


def write_features(
    pretrained: Pretrained,
    audio: Iterable[Path],
    output: Path,
    *,
    channel: int | None = None,
    layers: Iterable[int] | None = None,
    file_format: str = "npy",
    chunk_seconds: float = CHUNK_SECONDS,
    overlap_seconds: float = OVERLAP_SECONDS,
    batch_seconds: float = BATCH_SECONDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenFeatures:
    """Write the hidden states of each utterance to a file, in fp32.

    `audio` names audio files, folders of them, or Lhotse cut manifests. A file in `output` is named after the utterance
    (see `find_utterances`); an existing one is replaced. `npy` is an array
    [layers, frames, dim] with ascending layers, or [frames, dim] for a single layer; `safetensors` has a tensor
    `layer_N` [frames, dim] for each layer. For the other arguments see `Pretrained.features` and `map_utterances`.

    Memory does not depend on the length of the audio. Audio that cannot be used is skipped and listed in the result.
    Raises UserError if a folder contains no audio, a manifest is unusable, two utterances have the same name, an
    argument is out of range, or a file cannot be written.
    """
    check_format(file_format)
    chosen = pretrained.resolve_layers(layers)
    utterances: dict[str, Utterance] = {}
    for utterance in find_utterances(audio, channel=channel):
        other = utterances.setdefault(utterance.name, utterance)
        if other is not utterance:
            raise UserError(f"{utterance.file}: its output {output / utterance.name} is also that of {other.file}")

    def write(utterance: Utterance, audio: Audio, chunks: Iterator[ChunkFeatures]) -> int:
        shape = (pretrained.frames(audio), pretrained.config.model.dim)
        _write(output / f"{utterance.name}.{file_format}", chosen, shape, chunks)
        return shape[0]

    results = map_utterances(
        write,
        pretrained,
        utterances.values(),
        layers=chosen,
        chunk_seconds=chunk_seconds,
        overlap_seconds=overlap_seconds,
        batch_seconds=batch_seconds,
        progress=progress,
    )
    frames, bad = collect(results)
    return WrittenFeatures(len(frames), sum(frames), chosen, bad)


def _write(path: Path, layers: Sequence[int], shape: tuple[int, int], chunks: Iterator[ChunkFeatures]) -> None:
    """Write the chunks of an utterance of `shape` [frames, dim]: in both formats a header and one array per layer."""
    frames, dim = shape
    with new_file(path, "wb") as file:
        if path.suffix == ".npy":
            whole = shape if len(layers) == 1 else (len(layers), *shape)
            header = {"descr": "<f4", "fortran_order": False, "shape": whole}
            np.lib.format.write_array_header_1_0(file, header)
        else:
            file.write(safetensors_header({f"layer_{layer}": ("F32", shape) for layer in layers}))
        start = file.tell()
        for chunk in chunks:
            for number, hidden_TD in enumerate(chunk.hidden):
                file.seek(start + 4 * dim * (number * frames + chunk.first))
                file.write(hidden_TD.contiguous().numpy().astype("<f4", copy=False).data)
