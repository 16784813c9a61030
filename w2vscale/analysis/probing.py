"""Train a linear CTC probe on each layer of a trained model, and measure what its discrete codes encode, if any.

The error rate of the probes shows which layer separates characters best (Pasad et al. 2021 compare layers in more
ways). The co-occurrence of the codes with characters and speakers shows what the codes stand for
(Baevski et al. 2020, appendix D, uses phonemes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from w2vscale.analysis.alignment import align, fill_blanks
from w2vscale.data.audio import AudioError
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.transcripts import Transcripts, refuse_too_many
from w2vscale.data.vocabulary import SPACE
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import Audio, ChunkFeatures, Pretrained
from w2vscale.inference.utterances import Utterance, collect, map_utterances, utterances_by_name
from w2vscale.objectives.ctc import ctc_loss, greedy_labels

LEARNING_RATE = 0.01
BATCH_UTTERANCES = 4
REACH = 2  # a frame belongs to a character if the probe marks the character at most this many frames away
SILENCE = "·"  # the class of a frame that belongs to no character


@dataclass(frozen=True)
class EncodedUtterance:
    """The labels of an utterance, and what the frozen model computes for its audio."""

    speaker: str
    labels: list[int]
    hidden_LTD: Tensor
    codes_TG: NDArray[np.int64]  # G = 0 if the model has no codes

    @property
    def frames(self) -> int:
        """The number of frames."""
        return self.hidden_LTD.shape[1]


@dataclass(frozen=True)
class Cooccurrence:
    """The number of frames of each class and code."""

    classes: list[str]
    frames_CV: NDArray[np.int64]
    by_chance: float = 0.0  # the information that remains when the codes are shuffled over the frames

    @property
    def information(self) -> float:
        """Mutual information of codes and classes divided by the entropy of the classes (the uncertainty coefficient):
        0 if they are independent, 1 if the code determines the class."""
        joint_CV = self.frames_CV / max(self.frames_CV.sum(), 1)
        entropy = _entropy(joint_CV.sum(axis=1))
        mutual = entropy + _entropy(joint_CV.sum(axis=0)) - _entropy(joint_CV.ravel())
        return float(max(mutual, 0.0) / entropy) if entropy > 0.0 else 0.0


@dataclass(frozen=True)
class ProbeResult:
    """The result of probing a model."""

    error_rates: dict[int, float]  # label error rate of the probe of each layer on the test set, greedy decoding
    letters: list[Cooccurrence]  # of the entries of each codebook; empty if the model has no codes
    speakers: list[Cooccurrence]
    frames: int
    train_utterances: int
    test_utterances: int
    bad: list[BadAudio]

    def metrics(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "label_error_rate": self.error_rates,
            "best_layer": self.best_layer,
            "codebooks": [
                {
                    "letters": letters.information,
                    "letters_by_chance": letters.by_chance,
                    "speakers": speakers.information,
                    "speakers_by_chance": speakers.by_chance,
                }
                for letters, speakers in zip(self.letters, self.speakers, strict=True)
            ],
            "train_utterances": self.train_utterances,
            "test_utterances": self.test_utterances,
            "frames": self.frames,
            "left_out": len(self.bad),
        }

    @property
    def best_layer(self) -> int:
        """The layer whose probe has the lowest error rate."""
        return min(self.error_rates, key=lambda layer: self.error_rates[layer])


def probe(
    pretrained: Pretrained,
    train: Sequence[Path],
    test: Sequence[Path],
    *,
    vocabulary: Sequence[str],
    layers: Sequence[int] | None = None,
    updates: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> ProbeResult:
    """Train a CTC probe on each of `layers` (default: all) with the manifests `train`, and evaluate it on `test`.

    The first symbol of `vocabulary` is the CTC blank. The model is run once and does not change; the features of all
    layers are held in memory, in fp32. If the model has discrete codes, the probe of the best layer aligns characters
    with frames. `progress` is called with (updates done, updates in total). Raises UserError if a layer does not exist,
    a manifest is unusable, or no utterance of `train` or `test` can be used.
    """
    chosen = pretrained.resolve_layers(layers)
    spelling = Transcripts(vocabulary)
    bad: list[BadAudio] = []
    log(f"computing layers {', '.join(map(str, chosen))} of all utterances")
    train_set, test_set = (_encode(pretrained, paths, chosen, spelling, bad) for paths in (train, test))
    for paths, utterances in ((train, train_set), (test, test_set)):
        if not utterances:
            names = ", ".join(map(str, paths)) or "no manifest"
            raise UserError(f"{names}: no utterance has both a transcript and usable audio")
    everything = [*train_set, *test_set]
    _standardise(everything, train_set)
    log(f"training a probe of each on {len(train_set):,} utterances")
    weight_LDV, bias_LV = _train(train_set, len(vocabulary), pretrained.device, updates, progress)

    def log_probabilities_LTV(one: EncodedUtterance) -> Tensor:
        return (one.hidden_LTD @ weight_LDV + bias_LV.unsqueeze(1)).log_softmax(dim=2)

    errors_L, labels = np.zeros(len(chosen), dtype=np.int64), 0
    for one in test_set:
        scores_LTV = log_probabilities_LTV(one)
        errors_L += [Levenshtein.distance(greedy_labels(scores_TV), one.labels) for scores_TV in scores_LTV]
        labels += len(one.labels)
    best = int(errors_L.argmin())
    codes_GT, entries = np.concatenate([one.codes_TG for one in everything]).T, pretrained.objective.code_entries
    aligned = everything if len(codes_GT) else []  # without codes there is nothing to compare with
    letters = [_frame_letters(log_probabilities_LTV(one)[best].numpy(), one.labels, vocabulary) for one in aligned]
    speakers = [np.full(one.frames, one.speaker) for one in aligned]
    return ProbeResult(
        error_rates={layer: int(errors) / labels for layer, errors in zip(chosen, errors_L, strict=True)},
        letters=[cooccurrence(np.concatenate(letters), codes_T, entries) for codes_T in codes_GT],
        speakers=[cooccurrence(np.concatenate(speakers), codes_T, entries) for codes_T in codes_GT],
        frames=sum(one.frames for one in everything),
        train_utterances=len(train_set),
        test_utterances=len(test_set),
        bad=bad,
    )


def _encode(
    pretrained: Pretrained, manifests: Sequence[Path], layers: Sequence[int], spelling: Transcripts, bad: list[BadAudio]
) -> list[EncodedUtterance]:
    """Run the model on the utterances of manifests; those without a transcript or usable audio are added to `bad`."""
    labels: dict[str, list[int]] = {}
    transcribed = []
    for utterance in utterances_by_name(manifests).values():
        try:
            if utterance.overhang is not None:
                raise utterance.overhang
            labels[utterance.name], _ = spelling.labels(utterance.transcript)
            transcribed.append(utterance)
        except AudioError as error:
            bad.append(utterance.bad(error))

    def encode(utterance: Utterance, audio: Audio, chunks: Iterator[ChunkFeatures]) -> EncodedUtterance:
        found = list(chunks)
        hidden_LTD = torch.cat([torch.stack(chunk.hidden) for chunk in found], dim=1)
        frames = hidden_LTD.shape[1]
        codes = [chunk.codes_TG.numpy() for chunk in found if chunk.codes_TG is not None]
        codes_TG = np.concatenate(codes) if codes else np.empty((frames, 0), dtype=np.int64)
        refuse_too_many(labels[utterance.name], frames)
        return EncodedUtterance(utterance.speaker, labels[utterance.name], hidden_LTD, codes_TG)

    encoded, unusable = collect(map_utterances(encode, pretrained, transcribed, layers=layers, codes=True))
    bad.extend(unusable)
    return encoded


def _standardise(utterances: Sequence[EncodedUtterance], reference: Sequence[EncodedUtterance]) -> None:
    """Normalise each dimension of each layer to zero mean and unit variance over `reference`, in place.

    A linear probe can express the same functions as before, and one learning rate suits all layers.
    """
    for layer in range(len(reference[0].hidden_LTD)):
        whole_TD = torch.cat([one.hidden_LTD[layer] for one in reference])
        variance_D, mean_D = torch.var_mean(whole_TD, dim=0, correction=0)
        for one in utterances:
            one.hidden_LTD[layer].sub_(mean_D).mul_((variance_D + 1e-8).rsqrt())


def _train(
    utterances: Sequence[EncodedUtterance],
    symbols: int,
    device: torch.device,
    updates: int,
    progress: Callable[[int, int], None],
) -> tuple[Tensor, Tensor]:
    """Train the probes of all layers side by side, independently; returns weights [L, D, V] and biases [L, V]."""
    layers, _, dim = utterances[0].hidden_LTD.shape
    weight_LDV = torch.zeros(layers, dim, symbols, device=device, requires_grad=True)
    bias_LV = torch.zeros(layers, symbols, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight_LDV, bias_LV], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=updates)
    random = np.random.default_rng(0)
    size = min(BATCH_UTTERANCES, len(utterances))
    for update in range(updates):
        batch = [utterances[index] for index in random.choice(len(utterances), size, replace=False)]
        frames_B = torch.tensor([one.frames for one in batch], device=device)
        counts_B = torch.tensor([len(one.labels) for one in batch], device=device)
        labels_S = torch.tensor([label for one in batch for label in one.labels], device=device)
        x_BTLD = pad_sequence([one.hidden_LTD.transpose(0, 1) for one in batch], batch_first=True).to(device)
        logits_LBTV = torch.einsum("btld,ldv->lbtv", x_BTLD, weight_LDV) + bias_LV[:, None, None]
        given = (labels.repeat(layers) for labels in (frames_B, labels_S, counts_B))
        loss = ctc_loss(logits_LBTV.flatten(0, 1), *given)
        optimizer.zero_grad()
        (loss / labels_S.numel()).backward()
        optimizer.step()
        schedule.step()
        progress(update + 1, updates)
    return weight_LDV.detach().cpu(), bias_LV.detach().cpu()


def _frame_letters(
    log_probabilities_TV: NDArray[np.floating], labels: Sequence[int], vocabulary: Sequence[str]
) -> NDArray[np.str_]:
    """Return the character of each frame by forced alignment. The space between words counts as silence."""
    names = [SILENCE if vocabulary[label] == SPACE else vocabulary[label] for label in labels]
    # Position -1, the last one, is a blank.
    return np.array([*names, SILENCE])[fill_blanks(align(log_probabilities_TV, labels), REACH)]


def cooccurrence(classes: NDArray[np.str_], codes: NDArray[np.int64], entries: int) -> Cooccurrence:
    """Count the frames of each class and code, given the class and the code (below `entries`) of each frame."""
    names, numbers = np.unique(classes, return_inverse=True)

    def count(codes: NDArray[np.int64], by_chance: float) -> Cooccurrence:
        counts = np.bincount(numbers * entries + codes, minlength=len(names) * entries)
        return Cooccurrence(names.tolist(), counts.reshape(len(names), entries), by_chance)

    return count(codes, by_chance=count(np.random.default_rng(0).permutation(codes), 0.0).information)


def _entropy(probabilities: NDArray[np.floating]) -> float:
    return float(torch.special.entr(torch.from_numpy(probabilities)).sum())
