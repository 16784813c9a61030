"""What an objective can show of a few utterances: masks, predictions, codes, text and attention, as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from w2vscale.data.inputs import AudioBatch
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder


@dataclass(frozen=True)
class Sample:
    """One utterance of T frames, and what the model made of it."""

    waveform_S: NDArray[np.float32]
    masked_T: NDArray[np.bool_]
    correct_T: NDArray[np.float32]  # fraction of a masked frame's predictions that are correct; NaN elsewhere
    symbols: tuple[tuple[int, str], ...] = ()  # symbols of the output, each with its first frame
    reference: str = ""
    hypothesis: str = ""


@dataclass(frozen=True)
class Details:
    """What can be shown of the first utterances of a micro-batch."""

    samples: tuple[Sample, ...]
    codes_MG: NDArray[np.int64] | None = None  # codes of the masked frames of the whole micro-batch
    entries: int = 0  # of each codebook
    attention: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    """Attention weights [H, T, T] (query, key) of the first utterance, by block, counted from 1."""


class FramePredictions(NamedTuple):
    """What a model predicts for M masked frames."""

    correct_M: Tensor  # fraction of the predictions that are correct
    codes_MG: Tensor


def masked_details(
    inputs: Any, predictions: FramePredictions, *, entries: int, samples: int, attention: Mapping[int, Tensor]
) -> Details:
    """Make the details of an objective that predicts masked frames.

    `inputs` has the masked frames, utterance by utterance: `frame_M`, and `masked`, the number of each utterance.
    """
    audio, frames_M = inputs.audio, inputs.frame_M.cpu().split(list(inputs.masked))
    correct_M = predictions.correct_M.float().cpu().split(list(inputs.masked))
    shown = []
    for number in range(min(samples, len(audio.samples))):
        masked_T = np.zeros(audio.frames[number], dtype=np.bool_)
        masked_T[frames_M[number].numpy()] = True
        correct_T = np.full(audio.frames[number], np.nan, dtype=np.float32)
        correct_T[frames_M[number].numpy()] = correct_M[number].numpy()
        shown.append(Sample(waveform(audio, number), masked_T, correct_T))
    return Details(tuple(shown), predictions.codes_MG.cpu().numpy(), entries, on_host(attention))


def waveform(audio: AudioBatch, number: int) -> NDArray[np.float32]:
    """Copy one utterance of a batch to the host, without its padding."""
    return audio.waveforms_BS[number, : audio.samples[number]].float().cpu().numpy()


def on_host(attention: Mapping[int, Tensor]) -> dict[int, NDArray[np.float32]]:
    """Copy attention weights to the host."""
    return {block: weights_HTT.float().cpu().numpy() for block, weights_HTT in attention.items()}


@contextmanager
def attention_of_first(module: nn.Module, audio: AudioBatch, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the attention weights [H, T, T] of the first utterance in the forwards inside, by block (from 1).

    Attention kernels do not return their weights, so they are computed from the queries and keys. The blocks are not
    compiled meanwhile: compiled code would not call the hooks. Engines that shard need no further gathering.
    """
    found: dict[int, Tensor] = {}
    encoder = next(one for one in module.modules() if isinstance(one, Wav2Vec2Encoder))
    frames = audio.frames[0]  # its frames are the first ones of the packed batch
    with ExitStack() as stack:
        for number in blocks:
            block: Any = encoder.transformer.blocks[number - 1]

            def keep(
                _: nn.Module, __: Any, qkv_N3D: Tensor, number: int = number, heads: int = block.attention.heads
            ) -> None:
                q_THE, k_THE, _v = qkv_N3D[:frames].float().unflatten(1, (3, heads, -1)).unbind(1)
                scores_HTT = torch.einsum("qhe,khe->hqk", q_THE, k_THE) / q_THE.shape[2] ** 0.5
                found[number] = scores_HTT.softmax(dim=2)

            stack.enter_context(_plain_forward(block))
            stack.callback(block.attention.qkv.register_forward_hook(keep).remove)
        yield found


@contextmanager
def _plain_forward(module: nn.Module) -> Iterator[None]:
    """Use the forward of the class inside, not one that compilation or checkpointing has put in its place."""
    replaced = vars(module).pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            module.forward = replaced
