"""Write hidden states of audio files, folders and manifests to .npy or safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenFeatures:
    """Write the hidden states of each utterance to a file, in fp32.

    `audio` names audio files, folders of them, or Lhotse cut manifests. A file in `output` is named after the audio
    file, after its path below a folder, or after the id of a cut; an existing one is replaced. `npy` is an array
    [layers, frames, dim] with ascending layers, or [frames, dim] for a single layer; `safetensors` has a tensor
    `layer_N` [frames, dim] for each layer. For the layers and seconds see `Pretrained.features` and
    `Pretrained.stream`. `progress` is called with (seconds of audio done, seconds in total).

    Memory does not depend on the length of the audio. Audio that cannot be used is skipped and listed in the result.

    Raises:
        UserError: a folder contains no audio, a manifest is unusable, two utterances have the same name, an argument
            is out of range, or a file cannot be written.
    """
    if file_format not in FORMATS:
        raise UserError(f"--format {file_format}: choose one of {', '.join(FORMATS)}")
    chosen = pretrained.resolve_layers(layers)
    utterances: dict[str, Utterance] = {}
    for utterance in chain.from_iterable(map(find_utterances, audio)):
        other = utterances.setdefault(utterance.name, utterance)
        if other is not utterance:
            raise UserError(f"{utterance.file}: its output {output / utterance.name} is also that of {other.file}")
    opened, bad = open_by_duration(utterances.values())
    seconds = [one.samples / one.sampling_rate for _, one in opened]
    ends = list(accumulate(seconds, initial=0.0))
    files = total_frames = 0
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
                progress(round(ends[number] + seconds[number] * done / frames), round(ends[-1]))
            files += 1
            total_frames += frames
        except AudioError as error:
            bad.append(utterance.bad(error))
            progress(round(ends[number + 1]), round(ends[-1]))
    return WrittenFeatures(files, total_frames, chosen, bad)


def _write(path: Path, layers: Sequence[int], shape: tuple[int, int], chunks: Iterator[ChunkFeatures]) -> Iterator[int]:
    """Write the chunks of an utterance of `shape` [frames, dim]; yields the number of frames done after each.

    In both formats a header is followed by one array per layer.
    """
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
            yield chunk.first + len(chunk.hidden[0])
