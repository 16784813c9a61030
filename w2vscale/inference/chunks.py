"""Chunks of long audio: how an utterance is split, and what is computed for each chunk."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

from torch import Tensor

from w2vscale.data.audio import AudioError
from w2vscale.data.resampling import Samples
from w2vscale.models.wav2vec2 import Statistics


class Chunk(NamedTuple):
    """Frames of an utterance: [begin, end) are computed, [first, last) are kept, the others are context."""

    begin: int
    first: int
    last: int
    end: int


class Part(NamedTuple):
    """The samples of a chunk, and the GroupNorm statistics of the whole utterance if the chunk is only a part of it."""

    chunk: Chunk
    samples: Samples
    statistics: Statistics | None


class ChunkFeatures(NamedTuple):
    """What the model computes for the frames of one chunk of an utterance, on the CPU."""

    first: int  # number of the first frame in the utterance
    hidden: list[Tensor]  # hidden states [frames, dim] of each requested layer, fp32
    codes_TG: Tensor | None  # codebook entries that the quantizer chooses, if requested


def split_into_chunks(frames: int, *, chunk_frames: int, overlap_frames: int) -> list[Chunk]:
    """Split an utterance into chunks of about equal length, each with up to `overlap_frames` of context per side."""
    count = -(-frames // chunk_frames)
    edges = [frames * number // count for number in range(count + 1)]
    return [
        Chunk(max(first - overlap_frames, 0), first, last, min(last + overlap_frames, frames))
        for first, last in pairwise(edges)
    ]


def by_audio(stream: Iterator[tuple[int, ChunkFeatures | AudioError]]) -> Iterator[tuple[int, Iterator[ChunkFeatures]]]:
    """Group the items of `Pretrained.stream` by audio: pairs of an audio's position and its chunks.

    Iterate over the chunks of an audio before asking for the next audio. Iterating raises the AudioError of the audio.
    """
    for number, items in groupby(stream, key=itemgetter(0)):
        yield number, _chunks(items)


def _chunks(items: Iterator[tuple[int, ChunkFeatures | AudioError]]) -> Iterator[ChunkFeatures]:
    for _, item in items:
        if isinstance(item, AudioError):
            raise item
        yield item
