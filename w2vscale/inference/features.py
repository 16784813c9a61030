"""Write hidden states of audio files, folders and manifests to .npy or safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path

import numpy as np

from w2vscale.data.audio import AudioError
from w2vscale.data.micro_batch import BadAudio
from w2vscale.errors import UserError
from w2vscale.files import new_file, safetensors_header
from w2vscale.inference.chunks import ChunkFeatures, by_audio
from w2vscale.inference.pretrained import BATCH_SECONDS, CHUNK_SECONDS, OVERLAP_SECONDS, Pretrained
from w2vscale.inference.utterances import Utterance, find_utterances, open_by_duration

FORMATS = ("npy", "safetensors")


@dataclass(frozen=True)
class WrittenFeatures:
    """How much was written, and which audio could not be used."""

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
    file_format: str = "npy",
    chunk_seconds: float = CHUNK_SECONDS,
    overlap_seconds: float = OVERLAP_SECONDS,
    batch_seconds: float = BATCH_SECONDS,
    progress: Callable[[int, int], None] | None = None,
) -> WrittenFeatures:
    """Write the hidden states of each utterance to a file, in fp32.

    Args:
        pretrained: the model.
        audio: audio files, folders of them, or Lhotse cut manifests.
        output: the folder to write to. A file is named after the audio file, after its path below a folder, or after
            the id of a cut. Existing files are replaced. Each file is written under a temporary name first.
        layers: see `Pretrained.features`, also for `chunk_seconds` and `overlap_seconds`.
        file_format: `npy`, an array [layers, frames, dim] with ascending layers, or [frames, dim] for a single layer;
            or `safetensors`, a tensor `layer_N` [frames, dim] for each layer.
        batch_seconds: padded audio per forward pass.
        progress: called with (seconds of audio done, seconds in total).

    Memory does not depend on the length of the audio. Audio that cannot be used is skipped and listed in the result.

    Raises:
        UserError: a folder contains no audio, a manifest is unusable, two utterances have the same name, an argument
            is out of range, or a file cannot be written.
    """
    if file_format not in FORMATS:
        raise UserError(f"--format {file_format}: choose one of {', '.join(FORMATS)}")
    chosen = pretrained.resolve_layers(layers)
    utterances = [utterance for path in audio for utterance in find_utterances(path)]
    _refuse_clashes(utterances, output)
    opened, bad = open_by_duration(utterances)
    seconds = [one.samples / one.sampling_rate for _, one in opened]
    ends = list(accumulate(seconds))
    written = total_frames = 0
    stream = pretrained.stream(
        [one for _, one in opened],
        layers=chosen,
        chunk_seconds=chunk_seconds,
        overlap_seconds=overlap_seconds,
        batch_seconds=batch_seconds,
    )
    for number, chunks in by_audio(stream):
        utterance, one = opened[number]
        frames = pretrained.frames(one)
        path = output / f"{utterance.name}.{file_format}"
        try:
            for done in _write(path, chosen, (frames, pretrained.config.model.dim), chunks):
                if progress is not None:
                    progress(round(ends[number] - seconds[number] * (1 - done / frames)), round(ends[-1]))
            written += 1
            total_frames += frames
        except AudioError as error:
            bad.append(utterance.bad(error))
            if progress is not None:
                progress(round(ends[number]), round(ends[-1]))
    return WrittenFeatures(written, total_frames, chosen, bad)


def _refuse_clashes(utterances: Sequence[Utterance], output: Path) -> None:
    seen: dict[str, Utterance] = {}
    for utterance in utterances:
        other = seen.setdefault(utterance.name, utterance)
        if other is not utterance:
            raise UserError(f"{utterance.file}: its output {output / utterance.name} is also that of {other.file}")


def _write(path: Path, layers: Sequence[int], shape: tuple[int, int], chunks: Iterator[ChunkFeatures]) -> Iterator[int]:
    """Write the chunks of an utterance of `shape` [frames, dim]; yields the number of frames done after each.

    In both formats a header is followed by one array per layer.
    """
    frames, dim = shape
    with new_file(path, "wb") as file:
        file.write((_npy_header if path.suffix == ".npy" else _safetensors_header)(layers, shape))
        start = file.tell()
        for chunk in chunks:
            for number, hidden_TD in enumerate(chunk.hidden):
                file.seek(start + 4 * dim * (number * frames + chunk.first))
                file.write(hidden_TD.contiguous().numpy().astype("<f4", copy=False).data)
            yield chunk.first + len(chunk.hidden[0])


def _npy_header(layers: Sequence[int], shape: tuple[int, int]) -> bytes:
    out = BytesIO()
    whole = shape if len(layers) == 1 else (len(layers), *shape)
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": whole})
    return out.getvalue()


def _safetensors_header(layers: Sequence[int], shape: tuple[int, int]) -> bytes:
    return safetensors_header({f"layer_{layer}": ("F32", shape) for layer in layers})
