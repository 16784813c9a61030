"""What a pretrained model has learned about speech before it is fine-tuned.

A linear CTC probe on the frozen features of each layer (Pasad et al. 2021 compare layers in more ways) tells which
layer spells best. The co-occurrence of the quantizer's codes with letters and with speakers (Baevski et al. 2020,
appendix D, has phonemes) tells what the codes stand for.
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
from torch.nn import functional as F

from w2vscale.analysis.alignment import align, spread
from w2vscale.data.audio import AudioError
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.transcripts import SPACE, Transcripts, refuse_too_many, transcript
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import Pretrained
from w2vscale.inference.sources import open_by_duration, sources_by_name
from w2vscale.objectives.contrastive_model import Wav2Vec2ForPretraining
from w2vscale.objectives.ctc import ctc_loss, greedy_labels

LEARNING_RATE = 0.01
BATCH_UTTERANCES = 4
REACH = 2
"""Frames on either side of where a probe marks a letter that count as the letter."""

SILENCE = "·"
"""What a frame is that no letter is near to."""


@dataclass(frozen=True)
class Utterance:
    """What the frozen model computes of an utterance, and what is known of it."""

    speaker: str
    labels: list[int]
    hidden_LTD: Tensor
    codes_TG: NDArray[np.int64]


@dataclass(frozen=True)
class Cooccurrence:
    """In how many frames each code of a codebook met each class."""

    classes: list[str]
    frames_CV: NDArray[np.int64]

    @property
    def information(self) -> float:
        """Mutual information of codes and classes, as a share of the classes' entropy: 0 if they are independent, 1
        if the code tells the class."""
        joint_CV = self.frames_CV / max(self.frames_CV.sum(), 1)
        entropy = _entropy(joint_CV.sum(axis=1))
        mutual = entropy + _entropy(joint_CV.sum(axis=0)) - _entropy(joint_CV.ravel())
        return float(max(mutual, 0.0) / entropy) if entropy > 0.0 else 0.0


@dataclass(frozen=True)
class Codebook:
    """What the entries of a codebook stand for."""

    letters: Cooccurrence
    speakers: Cooccurrence
    letters_by_chance: float
    """The information of the same codes about the same letters in shuffled order."""
    speakers_by_chance: float


@dataclass(frozen=True)
class Probed:
    """What was found of a model."""

    error_rates: dict[int, float]
    """Of each layer: edits per label of the test set by its probe, greedily."""
    codebooks: list[Codebook]
    frames: int
    train_utterances: int
    test_utterances: int
    bad: list[BadAudio]

    def document(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "label_error_rate": self.error_rates,
            "best_layer": self.best_layer,
            "codebooks": [
                {
                    "letters": codebook.letters.information,
                    "letters_by_chance": codebook.letters_by_chance,
                    "speakers": codebook.speakers.information,
                    "speakers_by_chance": codebook.speakers_by_chance,
                }
                for codebook in self.codebooks
            ],
            "train_utterances": self.train_utterances,
            "test_utterances": self.test_utterances,
            "frames": self.frames,
            "left_out": len(self.bad),
        }

    @property
    def best_layer(self) -> int:
        """The layer whose probe spells best."""
        return min(self.error_rates, key=lambda layer: self.error_rates[layer])


def probe(
    pretrained: Pretrained,
    train: Sequence[Path],
    test: Sequence[Path],
    *,
    vocabulary: Sequence[str],
    layers: Sequence[int] | None = None,
    updates: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Probed:
    """Probe a pretrained model with the transcripts of some manifests; it is computed once, and not changed.

    All layers' features are held in memory, in fp32. Letters are aligned with frames by the best layer's probe.
    `progress` is called with (updates done, updates in all).

    Raises:
        UserError: the checkpoint is fine-tuned, a manifest cannot be used, or holds no utterance that can be.
    """
    if not isinstance(pretrained.model, Wav2Vec2ForPretraining):
        raise UserError("the checkpoint is fine-tuned: probes are for pretrained ones")
    wanted = pretrained.checked_layers(layers)
    spelling = Transcripts(vocabulary)
    bad: list[BadAudio] = []
    log(f"computing layers {', '.join(map(str, wanted))} of all utterances")
    learned, tested = ([*_utterances(pretrained, paths, wanted, spelling, bad)] for paths in (train, test))
    for paths, found in ((train, learned), (test, tested)):
        if not found:
            names = ", ".join(map(str, paths)) or "no manifest"
            raise UserError(f"{names}: no utterance has both a transcript and usable audio")
    everyone = [*learned, *tested]
    _standardise(everyone, learned)
    device = pretrained.model.encoder.mask_embedding.device
    log(f"training a probe of each on {len(learned):,} utterances")
    weight_LDV, bias_LV = _train(learned, len(vocabulary), device=device, updates=updates, seed=seed, progress=progress)

    def log_probabilities_LTV(one: Utterance) -> Tensor:
        return (one.hidden_LTD @ weight_LDV + bias_LV.unsqueeze(1)).log_softmax(dim=2)

    errors_L, labels = np.zeros(len(wanted), dtype=np.int64), 0
    for one in tested:
        rows = log_probabilities_LTV(one)
        errors_L += [Levenshtein.distance(greedy_labels(row_TV), one.labels) for row_TV in rows]
        labels += len(one.labels)
    best = int(errors_L.argmin())
    letters = np.concatenate(
        [_letters(log_probabilities_LTV(one)[best].numpy(), one.labels, vocabulary) for one in everyone]
    )
    return Probed(
        error_rates={layer: int(errors) / labels for layer, errors in zip(wanted, errors_L, strict=True)},
        codebooks=_codebooks(everyone, letters, pretrained.config.model.codebook_entries, seed),
        frames=letters.size,
        train_utterances=len(learned),
        test_utterances=len(tested),
        bad=bad,
    )


def _utterances(
    pretrained: Pretrained, manifests: Sequence[Path], layers: Sequence[int], spelling: Transcripts, bad: list[BadAudio]
) -> Iterator[Utterance]:
    """What the model computes of utterances with transcripts; the rest goes to `bad`."""
    sources = sources_by_name(manifests)
    labels: dict[str, list[int]] = {}
    for name, source in sources.items():
        try:
            labels[name] = spelling.labels(transcript(source.cut))[0]
        except AudioError as error:
            bad.append(BadAudio(name, source.file, error.kind, str(error)))
    opened, unreadable = open_by_duration([sources[name] for name in labels])
    bad.extend(unreadable)
    stream = pretrained.stream([audio for _, audio in opened], layers=layers, codes=True)
    hidden: list[Tensor] = []
    codes: list[Tensor] = []
    for number, piece in stream:
        read, audio = opened[number]
        if isinstance(piece, AudioError):
            bad.append(BadAudio(read.name, read.file, piece.kind, str(piece)))
            hidden, codes = [], []
            continue
        assert piece.codes_TG is not None
        hidden.append(torch.stack(piece.hidden))
        codes.append(piece.codes_TG)
        if sum(map(len, codes)) < pretrained.frames(audio):
            continue
        hidden_LTD, codes_TG = torch.cat(hidden, dim=1), torch.cat(codes).numpy()
        hidden, codes = [], []
        try:
            refuse_too_many(labels[read.name], len(codes_TG))
        except AudioError as error:
            bad.append(BadAudio(read.name, read.file, error.kind, str(error)))
            continue
        speakers = (str(part.speaker) for part in read.cut.supervisions if part.speaker)
        yield Utterance(next(speakers, "unknown"), labels[read.name], hidden_LTD, codes_TG)


def _standardise(utterances: Sequence[Utterance], reference: Sequence[Utterance]) -> None:
    """Bring each dimension of each layer to zero mean and unit variance over `reference`, in place: what a linear probe
    can express stays the same, and one learning rate suits every layer."""
    count = sum(len(one.codes_TG) for one in reference)
    zero_L1D = torch.zeros_like(reference[0].hidden_LTD[:, :1], dtype=torch.float64)
    mean_L1D = sum((one.hidden_LTD.double().sum(dim=1, keepdim=True) for one in reference), zero_L1D) / count
    squares = ((one.hidden_LTD - mean_L1D).square().sum(dim=1, keepdim=True) for one in reference)
    scale_L1D = (sum(squares, zero_L1D) / count + 1e-8).rsqrt()
    for one in utterances:
        one.hidden_LTD.sub_(mean_L1D).mul_(scale_L1D)


def _train(
    utterances: Sequence[Utterance],
    symbols: int,
    *,
    device: torch.device,
    updates: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Weights [L, D, V] and biases [L, V] of all layers' probes, side by side: none depends on the others."""
    layers, _, dim = utterances[0].hidden_LTD.shape
    weight_LDV = torch.zeros(layers, dim, symbols, device=device, requires_grad=True)
    bias_LV = torch.zeros(layers, symbols, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight_LDV, bias_LV], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=updates)
    draws = np.random.default_rng(seed)
    size = min(BATCH_UTTERANCES, len(utterances))
    for update in range(updates):
        batch = [utterances[place] for place in draws.choice(len(utterances), size, replace=False)]
        frames_B = torch.tensor([len(one.codes_TG) for one in batch], device=device)
        counts_B = torch.tensor([len(one.labels) for one in batch], device=device)
        labels_S = torch.tensor([label for one in batch for label in one.labels], device=device)
        padded = [F.pad(one.hidden_LTD, (0, 0, 0, int(frames_B.max()) - len(one.codes_TG))) for one in batch]
        x_LBTD = torch.stack(padded, dim=1).to(device)
        logits_LBTV = (x_LBTD.flatten(1, 2) @ weight_LDV + bias_LV.unsqueeze(1)).view(*x_LBTD.shape[:3], symbols)
        loss = ctc_loss(
            logits_LBTV.flatten(0, 1),
            frames_B.repeat(layers),
            labels_S.repeat(layers),
            counts_B.repeat(layers),
        )
        optimizer.zero_grad()
        (loss / labels_S.numel()).backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(update + 1, updates)
    return weight_LDV.detach().cpu(), bias_LV.detach().cpu()


def _letters(
    log_probabilities_TV: NDArray[np.floating], labels: Sequence[int], vocabulary: Sequence[str]
) -> NDArray[np.str_]:
    """The letter of each frame, by alignment; a space between words is silence."""
    said = np.array([SILENCE if vocabulary[label] == SPACE else vocabulary[label] for label in labels] + [SILENCE])
    return said[spread(align(log_probabilities_TV, labels), REACH)]


def _codebooks(utterances: Sequence[Utterance], letters: NDArray[np.str_], entries: int, seed: int) -> list[Codebook]:
    codes_TG = np.concatenate([one.codes_TG for one in utterances])
    speakers = np.concatenate([np.full(len(one.codes_TG), one.speaker) for one in utterances])
    shuffled_TG = np.random.default_rng(seed).permutation(codes_TG)
    return [
        Codebook(
            letters=cooccurrence(letters, codes_T, entries),
            speakers=cooccurrence(speakers, codes_T, entries),
            letters_by_chance=cooccurrence(letters, shuffled_T, entries).information,
            speakers_by_chance=cooccurrence(speakers, shuffled_T, entries).information,
        )
        for codes_T, shuffled_T in zip(codes_TG.T, shuffled_TG.T, strict=True)
    ]


def cooccurrence(classes: NDArray[np.str_], codes: NDArray[np.int64], entries: int) -> Cooccurrence:
    """Count the frames of each class and code."""
    names, numbers = np.unique(classes, return_inverse=True)
    frames_CV = np.zeros((len(names), entries), dtype=np.int64)
    np.add.at(frames_CV, (numbers, codes), 1)
    return Cooccurrence(names.tolist(), frames_CV)


def _entropy(probabilities: NDArray[np.floating]) -> float:
    positive = probabilities[probabilities > 0.0]
    return float(-(positive * np.log(positive)).sum())
