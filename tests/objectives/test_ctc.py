"""The CTC model and its loss, against a sum over all alignments."""

from __future__ import annotations

from itertools import groupby, product

import pytest
import torch

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.data.transcripts import make_ctc_inputs
from w2vscale.objectives.ctc import BLANK, Wav2Vec2ForCTC, ctc_loss, greedy_labels, label_errors

CONFIG = load_config(
    "base", [*MICRO_MODEL, "objective.name=ctc", "objective.vocabulary=letters", "regularization.layerdrop=0"]
)


def by_alignments(logits_TV: torch.Tensor, labels: list[int]) -> float:
    """-log of the summed probability of every path that collapses to the labels."""
    probabilities = logits_TV.double().softmax(dim=1)
    total = 0.0
    for path in product(range(logits_TV.shape[1]), repeat=logits_TV.shape[0]):
        if [symbol for symbol, _ in groupby(path) if symbol != BLANK] == labels:
            total += float(torch.stack([probabilities[t, symbol] for t, symbol in enumerate(path)]).prod())
    return -float(torch.log(torch.tensor(total, dtype=torch.float64)))


def test_the_loss_is_that_of_all_alignments() -> None:
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    found = ctc_loss(logits, torch.tensor([6, 4]), torch.tensor([1, 2, 2, 1]), torch.tensor([3, 1]))
    expected = by_alignments(logits[0], [1, 2, 2]) + by_alignments(logits[1, :4], [1])
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_what_has_no_labels_or_too_many_weighs_nothing_and_moves_nothing() -> None:
    logits = torch.randn(3, 4, 3, requires_grad=True)
    labels, lengths = torch.tensor([1, 1, 1, 1, 2]), torch.tensor([4, 0, 1])
    found = ctc_loss(logits, torch.tensor([4, 4, 4]), labels, lengths)
    found.backward()
    assert logits.grad is not None
    assert not logits.grad[:2].any() and logits.grad[2].any()
    assert float(found.detach()) == pytest.approx(by_alignments(logits[2].detach(), [2]), rel=1e-5)


def test_greedy_labels_join_repetitions_and_drop_blanks() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0]
    logits = torch.nn.functional.one_hot(torch.tensor(path), 3).float()
    assert greedy_labels(logits) == [1, 1, 2]


@pytest.fixture(scope="module")
def model() -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    return Wav2Vec2ForCTC(CONFIG.model, CONFIG.ctc)


def test_an_utterance_has_the_same_loss_alone_and_padded(model: Wav2Vec2ForCTC) -> None:
    audio = [torch.randn(size, generator=torch.Generator().manual_seed(size)).numpy() for size in (9000, 6000)]
    labels = [[5, 6, 7], [8, 9]]
    both = make_ctc_inputs(audio, labels, [0, 1], number=0, seed=0, config=CONFIG)
    alone = [
        make_ctc_inputs([a], [each], [0], number=0, seed=0, config=CONFIG)
        for a, each in zip(audio, labels, strict=True)
    ]
    model.eval()
    with torch.no_grad():
        together, apart = model(both), [model(one) for one in alone]
    assert float(together.total) == pytest.approx(sum(float(one.total) for one in apart), rel=1e-5)
    assert float(together.labels) == 5
    assert float(together.errors) == sum(float(one.errors) for one in apart)


def test_errors_are_edits(model: Wav2Vec2ForCTC) -> None:
    inputs = make_ctc_inputs([torch.randn(2000).numpy()], [[5, 6, 7]], [0], number=0, seed=0, config=CONFIG)
    path = torch.tensor([5, 5, 0, 7, 7, 8][: int(inputs.frames_B)])
    logits = torch.nn.functional.one_hot(path, 32).float().unsqueeze(0)
    assert label_errors(logits, inputs) == 2  # 6 is missing, 8 is too many


def test_frozen_alone_the_head_learns_and_masks_are_for_training(model: Wav2Vec2ForCTC) -> None:
    inputs = make_ctc_inputs([torch.randn(16_000).numpy()], [[5, 6, 7]], [0], number=0, seed=0, config=CONFIG)
    model.train()
    model(inputs, frozen=True).total.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {"head.weight", "head.bias"}
    model.eval()
    everything = inputs._replace(mask_BT=torch.ones_like(inputs.mask_BT))
    with torch.no_grad():
        assert float(model(inputs).total) == float(model(everything).total)
