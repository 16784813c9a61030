"""What probes are trained on: the hidden states of a model, also with random weights, and log-mel features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2vscale.data.audio import AudioError
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.transcripts import Transcripts, refuse_too_many
from w2vscale.inference.pretrained import Audio, ChunkFeatures, Pretrained
from w2vscale.inference.utterances import Utterance, collect, map_utterances, utterances_by_name
from w2vscale.models.initialisation import allocate
from w2vscale.objectives.base import empty_model, initial_state
from w2vscale.objectives.best_rq import LogMel, normalised

MEL_BINS = 80


@dataclass(frozen=True)
class Labelled:
    """An utterance and its labels."""

    utterance: Utterance
    labels: list[int]

    @property
    def name(self) -> str:
        """The name of the utterance."""
        return self.utterance.name


@dataclass(frozen=True)
class Encoded:
    """An utterance as a probe sees it: its labels, and the features of L layers in fp32."""

    name: str
    speaker: str
    labels: list[int]
    hidden_LTD: Tensor
    codes_TG: NDArray[np.int64]  # G = 0 if the model has no codes

    @property
    def frames(self) -> int:
        """The number of frames."""
        return self.hidden_LTD.shape[1]


def labelled_utterances(manifests: Sequence[Path], spelling: Transcripts, bad: list[BadAudio]) -> list[Labelled]:
    """Find the utterances of manifests and their labels; those without a usable transcript are added to `bad`."""
    found = []
    for utterance in utterances_by_name(manifests).values():
        try:
            if utterance.overhang is not None:
                raise utterance.overhang
            found.append(Labelled(utterance, spelling.labels(utterance.transcript)[0]))
        except AudioError as error:
            bad.append(utterance.bad(error))
    return found


def hidden_states(
    pretrained: Pretrained, utterances: Sequence[Labelled], layers: Sequence[int], bad: list[BadAudio]
) -> list[Encoded]:
    """Run a model on utterances; those without usable audio are added to `bad`."""
    labels = {one.name: one.labels for one in utterances}

    def encode(utterance: Utterance, audio: Audio, chunks: Iterator[ChunkFeatures]) -> Encoded:
        found = list(chunks)
        hidden_LTD = torch.cat([torch.stack(chunk.hidden) for chunk in found], dim=1)
        frames = hidden_LTD.shape[1]
        codes = [chunk.codes_TG.numpy() for chunk in found if chunk.codes_TG is not None]
        codes_TG = np.concatenate(codes) if codes else np.empty((frames, 0), dtype=np.int64)
        refuse_too_many(labels[utterance.name], frames)
        return Encoded(utterance.name, utterance.speaker, labels[utterance.name], hidden_LTD, codes_TG)

    opened = [one.utterance for one in utterances]
    encoded, unusable = collect(map_utterances(encode, pretrained, opened, layers=layers, codes=True))
    bad.extend(unusable)
    return encoded


def with_random_weights(pretrained: Pretrained) -> Pretrained:
    """Return the same model with the initial weights that `trainer.seed` of its run draws."""
    model = empty_model(pretrained.objective)
    allocate(model, pretrained.device)
    model.load_state_dict(dict(initial_state(pretrained.objective, pretrained.config.trainer.seed)))
    return replace(pretrained, model=model.eval())


def log_mel(pretrained: Pretrained, utterances: Sequence[Labelled]) -> list[Encoded]:
    """Compute log-mel features of utterances with usable audio, in as many frames as the model has.

    A frame has two windows of 25 ms, 10 ms apart, as in BEST-RQ. Over an utterance, each dimension has mean 0 and
    variance 1.
    """
    features = LogMel(pretrained.config.model, MEL_BINS)
    encoded = []
    for one in utterances:
        audio = one.utterance.open()
        frames = pretrained.frames(audio)
        waveform_S = torch.from_numpy(np.concatenate(list(pretrained.blocks(audio))))
        mel_1TJ = normalised(features(waveform_S.unsqueeze(0), frames), torch.tensor([frames]))
        encoded.append(Encoded(one.name, one.utterance.speaker, one.labels, mel_1TJ, np.empty((frames, 0), np.int64)))
    return encoded
