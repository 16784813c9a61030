"""Train a linear CTC probe on each layer of a trained model, and measure what its discrete codes encode, if any.

The error rate of the probes shows which layer separates characters best (Pasad et al. 2021 compare layers in more
ways), and whether it does so better than log-mel features, or than the same model before any training. The
co-occurrence of the codes with characters and speakers shows what the codes stand for (Baevski et al. 2020, appendix D,
uses phonemes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from w2vscale.analysis.codes import Cooccurrence, cooccurrence, frame_letters
from w2vscale.analysis.representations import (
    Encoded,
    hidden_states,
    labelled_utterances,
    log_mel,
    with_random_weights,
)
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.transcripts import Transcripts
from w2vscale.errors import UserError
from w2vscale.evaluation.bootstrap import relative_reduction
from w2vscale.inference.pretrained import Pretrained
from w2vscale.objectives.best_rq import check_log_mel
from w2vscale.objectives.ctc import ctc_loss, greedy_labels

LEARNING_RATE = 0.1
BATCH_UTTERANCES = 4

CONSTANT = 1e-8
"""A dimension whose variance is not above this counts as constant, and becomes zero."""

LEAST_VARIANCE = 1e-3
"""Added to the variance of each uncorrelated direction, so that one without variance in training cannot explode."""


@dataclass(frozen=True)
class Probe:
    """One probe on the test set."""

    counts: Mapping[str, tuple[float, int]]  # label errors of greedy decoding, and labels, of each utterance
    loss: float  # CTC loss in nats per label; it still tells probes apart that all make many errors

    @property
    def rate(self) -> float:
        """Label errors per label."""
        errors, labels = map(sum, zip(*self.counts.values(), strict=True))
        return errors / labels


@dataclass(frozen=True)
class Baselines:
    """Probes that were trained and tested in the same way, on features that need no pretraining."""

    log_mel: Probe
    random: dict[int, Probe]  # of the layers of the same model with random weights


@dataclass(frozen=True)
class ProbeResult:
    """The result of probing a model."""

    layers: dict[int, Probe]
    baselines: Baselines | None
    letters: list[Cooccurrence]  # of the entries of each codebook; empty if the model has no codes
    speakers: list[Cooccurrence]
    frames: int
    train_utterances: int
    test_utterances: int
    bad: list[BadAudio]

    @property
    def best_layer(self) -> int:
        """The layer whose probe has the lowest error rate."""
        return best_of(self.layers)

    def compared(self) -> dict[str, Probe]:
        """What the best layer is compared with: log-mel features, and the best layer with random weights."""
        if self.baselines is None:
            return {}
        return {"log_mel": self.baselines.log_mel, "random": self.baselines.random[best_of(self.baselines.random)]}

    def reductions(self) -> dict[str, tuple[float, float, float]]:
        """The relative reduction of the error rate of the best layer against each baseline, and its 95 % interval."""
        ours = self.layers[self.best_layer].counts
        return {name: relative_reduction(ours, other.counts) for name, other in self.compared().items()}

    def metrics(self) -> dict[str, Any]:
        """The result as a JSON object."""
        probes = {str(layer): probe for layer, probe in self.layers.items()}
        document: dict[str, Any] = _measured(self.layers)
        if self.baselines is not None:
            random = self.baselines.random
            probes |= {"log_mel": self.baselines.log_mel, **{f"random_{layer}": one for layer, one in random.items()}}
            document |= {
                "log_mel": {"label_error_rate": self.baselines.log_mel.rate, "ctc_loss": self.baselines.log_mel.loss},
                "random": _measured(random),
                "reduction": {
                    name: [value if math.isfinite(value) else None for value in reduction]
                    for name, reduction in self.reductions().items()
                },
            }
        return document | {
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
            "utterances": [
                {"utterance": name, "labels": labels, "errors": {key: probes[key].counts[name][0] for key in probes}}
                for name, (_, labels) in self.layers[self.best_layer].counts.items()
            ],
        }


def best_of(probes: Mapping[int, Probe]) -> int:
    """The layer whose probe has the lowest error rate."""
    return min(probes, key=lambda layer: probes[layer].rate)


def probe(
    pretrained: Pretrained,
    train: Sequence[Path],
    test: Sequence[Path],
    *,
    vocabulary: Sequence[str],
    layers: Sequence[int] | None = None,
    baselines: bool = True,
    updates: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> ProbeResult:
    """Train a CTC probe on each of `layers` (default: all) with the manifests `train`, and evaluate it on `test`.

    The first symbol of `vocabulary` is the CTC blank. `baselines`: train the same probes on log-mel features, and on
    the same layers with random weights. The model does not change; the features of all layers are held in memory, in
    fp32. If the model has discrete codes, the probe of the best layer aligns characters with frames. `progress` is
    called with (updates done, updates in total). Raises UserError if a layer does not exist, a manifest is unusable, or
    no utterance of `train` or `test` can be used.
    """
    chosen = pretrained.resolve_layers(layers)
    if baselines:
        check_log_mel(pretrained.config.model, "choose strides with an even product, or --no-baselines")
    spelling = Transcripts(vocabulary)
    bad: list[BadAudio] = []
    done, total = count(1), updates * (3 if baselines else 1)

    def trained(sets: Sequence[list[Encoded]], what: str) -> _Probes:
        log(f"training probes on {what} of {len(sets[0]):,} utterances")
        _whiten(sets)
        return _train(sets[0], len(vocabulary), pretrained.device, updates, lambda: progress(next(done), total))

    labelled = [labelled_utterances(paths, spelling, bad) for paths in (train, test)]
    log(f"computing layers {', '.join(map(str, chosen))} of all utterances")
    sets = [hidden_states(pretrained, utterances, chosen, bad) for utterances in labelled]
    for paths, encoded in zip((train, test), sets, strict=True):
        if not encoded:
            names = ", ".join(map(str, paths)) or "no manifest"
            raise UserError(f"{names}: no utterance has both a transcript and usable audio")
    probes = trained(sets, "the layers")
    found = dict(zip(chosen, probes.tested(sets[1]), strict=True))
    letters, speakers = _codes(
        [*chain(*sets)], probes, chosen.index(best_of(found)), vocabulary, entries=pretrained.objective.code_entries
    )
    result = ProbeResult(
        layers=found,
        baselines=None,
        letters=letters,
        speakers=speakers,
        frames=sum(one.frames for one in chain(*sets)),
        train_utterances=len(sets[0]),
        test_utterances=len(sets[1]),
        bad=bad,
    )
    if not baselines:
        return result
    usable = {one.name for one in chain(*sets)}
    labelled = [[one for one in utterances if one.name in usable] for utterances in labelled]
    del sets  # memory holds the features of one model at a time
    log("computing the same with random weights")
    untrained = with_random_weights(pretrained)
    sets = [hidden_states(untrained, utterances, chosen, bad) for utterances in labelled]
    random = dict(zip(chosen, trained(sets, "the layers with random weights").tested(sets[1]), strict=True))
    sets = [log_mel(pretrained, utterances) for utterances in labelled]
    (mel,) = trained(sets, "log-mel features").tested(sets[1])
    return replace(result, baselines=Baselines(mel, random))


def _measured(probes: Mapping[int, Probe]) -> dict[str, Any]:
    return {
        "label_error_rate": {str(layer): one.rate for layer, one in probes.items()},
        "ctc_loss": {str(layer): one.loss for layer, one in probes.items()},
        "best_layer": best_of(probes),
    }


@dataclass(frozen=True)
class _Probes:
    """A linear CTC output layer for each of L layers."""

    weight_LDV: Tensor
    bias_LV: Tensor

    def logits(self, hidden_LTD: Tensor) -> Tensor:
        """Scores of the symbols in each frame, [L, T, V]."""
        return hidden_LTD @ self.weight_LDV + self.bias_LV.unsqueeze(1)

    def tested(self, utterances: Sequence[Encoded]) -> list[Probe]:
        """Decode utterances with each of the probes, and compute the CTC loss of their labels."""
        counts: list[dict[str, tuple[float, int]]] = [{} for _ in self.bias_LV]
        losses = [0.0] * len(counts)
        for one in utterances:
            labels = torch.tensor(one.labels)
            lengths = torch.tensor([one.frames]), labels, torch.tensor([len(one.labels)])
            for layer, scores_TV in enumerate(self.logits(one.hidden_LTD)):
                errors = Levenshtein.distance(greedy_labels(scores_TV), one.labels)
                counts[layer][one.name] = (errors, len(one.labels))
                losses[layer] += float(ctc_loss(scores_TV.unsqueeze(0), *lengths))
        total = sum(len(one.labels) for one in utterances)
        return [Probe(of_layer, loss / total) for of_layer, loss in zip(counts, losses, strict=True)]


def _whiten(sets: Sequence[Sequence[Encoded]]) -> None:
    """Make the dimensions of each layer uncorrelated, with zero mean and unit variance over the first set, in place.

    A linear probe can express the same functions as before, but learns them in far fewer updates, and one learning
    rate suits all features. The symmetric form (ZCA) does not depend on which eigenvectors a solver finds.
    """
    train = sets[0]
    frames = sum(one.frames for one in train)
    layers, _, dim = train[0].hidden_LTD.shape
    for layer in range(layers):
        mean_D = torch.zeros(dim, dtype=torch.float64)
        covariance_DD = torch.zeros(dim, dim, dtype=torch.float64)
        for one in train:
            mean_D += one.hidden_LTD[layer].double().sum(dim=0) / frames
        for one in train:
            centred_TD = one.hidden_LTD[layer].double() - mean_D
            covariance_DD += centred_TD.T @ centred_TD / frames
        variance_D = covariance_DD.diagonal()
        scale_D = torch.where(variance_D > CONSTANT, variance_D.rsqrt(), 0.0)
        values_D, vectors_DD = torch.linalg.eigh(scale_D[:, None] * covariance_DD * scale_D)
        whitening_DD = scale_D[:, None] * (vectors_DD * (values_D + LEAST_VARIANCE).rsqrt()) @ vectors_DD.T
        for one in chain(*sets):
            one.hidden_LTD[layer].copy_((one.hidden_LTD[layer].double() - mean_D) @ whitening_DD)


def _train(
    utterances: Sequence[Encoded], symbols: int, device: torch.device, updates: int, progress: Callable[[], None]
) -> _Probes:
    """Train the probes of all layers side by side, independently. `progress` is called after each update."""
    layers, _, dim = utterances[0].hidden_LTD.shape
    weight_LDV = torch.zeros(layers, dim, symbols, device=device, requires_grad=True)
    bias_LV = torch.zeros(layers, symbols, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight_LDV, bias_LV], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=updates)
    random = np.random.default_rng(0)
    size = min(BATCH_UTTERANCES, len(utterances))
    for _ in range(updates):
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
        progress()
    return _Probes(weight_LDV.detach().cpu(), bias_LV.detach().cpu())


def _codes(
    utterances: Sequence[Encoded], probes: _Probes, best: int, vocabulary: Sequence[str], *, entries: int
) -> tuple[list[Cooccurrence], list[Cooccurrence]]:
    """Count how often the entries of each codebook occur with letters and with speakers; both empty without codes.

    `best` is the position of the layer whose probe aligns the letters.
    """
    codes_GT = np.concatenate([one.codes_TG for one in utterances]).T
    if not len(codes_GT):
        return [], []
    letters = [
        frame_letters(probes.logits(one.hidden_LTD)[best].log_softmax(dim=1).numpy(), one.labels, vocabulary)
        for one in utterances
    ]
    speakers = [np.full(one.frames, one.speaker) for one in utterances]
    of_letters, of_speakers = (
        [cooccurrence(np.concatenate(classes), codes_T, entries) for codes_T in codes_GT]
        for classes in (letters, speakers)
    )
    return of_letters, of_speakers
