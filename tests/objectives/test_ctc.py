"""CTC: the loss against a sum over all alignments, and what a forward needs besides the audio."""

from __future__ import annotations

from itertools import groupby, product
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.batches import inputs_of, same_inputs
from tests.helpers.micro import MICRO_ENCODER
from w2vscale.config import load_config
from w2vscale.data.inputs import join
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.vocabulary import LETTERS
from w2vscale.errors import UserError
from w2vscale.objectives import StepContext, build_objective, load, resolve
from w2vscale.objectives.ctc import (
    BLANK,
    Ctc,
    CtcInputs,
    CtcSums,
    Wav2Vec2ForCTC,
    count_errors,
    ctc_loss,
    greedy_labels,
)


def objective_with(*overrides: str) -> Ctc:
    settings = ["objective.name=ctc", "objective.vocabulary=letters", "regularization.layerdrop=0"]
    objective = build_objective(load_config("base", [*MICRO_ENCODER, *settings, "precision.compute=fp32", *overrides]))
    assert isinstance(objective, Ctc)
    return objective


OBJECTIVE = objective_with()


def ctc_inputs(
    objective: Ctc, sizes: list[int], labels: list[list[int]], *, places: list[int] | None = None, number: int = 0
) -> CtcInputs:
    """Labelled noise; `sizes` are in samples."""
    audio = [np.random.default_rng(size).standard_normal(size).astype(np.float32) for size in sizes]
    inputs: CtcInputs = inputs_of(objective, audio, labels, places=places, number=number)
    return inputs


def by_alignments(logits_TV: torch.Tensor, labels: list[int]) -> float:
    """-log of the summed probability of every path that collapses to the labels."""
    probabilities = logits_TV.double().softmax(dim=1)
    total = 0.0
    for path in product(range(logits_TV.shape[1]), repeat=logits_TV.shape[0]):
        if [symbol for symbol, _ in groupby(path) if symbol != BLANK] == labels:
            total += float(torch.stack([probabilities[t, symbol] for t, symbol in enumerate(path)]).prod())
    return -float(torch.log(torch.tensor(total, dtype=torch.float64)))


class TestLoss:
    def test_it_is_that_of_all_alignments(self) -> None:
        logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
        found = ctc_loss(logits, torch.tensor([6, 4]), torch.tensor([1, 2, 2, 1]), torch.tensor([3, 1]))
        expected = by_alignments(logits[0], [1, 2, 2]) + by_alignments(logits[1, :4], [1])
        assert float(found) == pytest.approx(expected, rel=1e-6)

    def test_utterances_without_labels_or_with_too_many_have_no_loss_and_no_gradient(self) -> None:
        logits = torch.randn(3, 4, 3, requires_grad=True)
        labels, lengths = torch.tensor([1, 1, 1, 1, 2]), torch.tensor([4, 0, 1])
        found = ctc_loss(logits, torch.tensor([4, 4, 4]), labels, lengths)
        found.backward()
        assert logits.grad is not None
        assert not logits.grad[:2].any() and logits.grad[2].any()
        assert float(found.detach()) == pytest.approx(by_alignments(logits[2].detach(), [2]), rel=1e-5)

    def test_greedy_labels_merge_repetitions_and_drop_blanks(self) -> None:
        path = [0, 1, 1, 0, 1, 2, 2, 0]
        logits = torch.nn.functional.one_hot(torch.tensor(path), 3).float()
        assert greedy_labels(logits) == [1, 1, 2]


class TestInputs:
    OBJECTIVE = objective_with("objective.channel_mask_probability=0.5", "objective.channel_mask_length=8")

    def test_draws_depend_on_the_place_of_the_utterance_only(self) -> None:
        labels = [[5, 6], [7], [8, 9, 10]]
        whole = ctc_inputs(self.OBJECTIVE, [9000, 7000, 8000], labels, number=4)
        left_out = ctc_inputs(self.OBJECTIVE, [9000, 8000], [labels[0], labels[2]], places=[0, 2], number=4)
        assert torch.equal(whole.audio.mask_BT[[0, 2]], left_out.audio.mask_BT)
        assert torch.equal(whole.channel_mask_BD[[0, 2]], left_out.channel_mask_BD)
        assert left_out.labels_L.tolist() == [5, 6, 8, 9, 10] and left_out.label_lengths_B.tolist() == [2, 3]
        assert (whole.weights, whole.audio.utterances, whole.audio.padded) == ((6,), (3,), True)

    def test_frames_and_channels_are_masked(self) -> None:
        inputs = ctc_inputs(self.OBJECTIVE, [32_000] * 30, [[5]] * 30)
        assert 0.4 < inputs.audio.mask_BT.float().mean() < 0.6
        assert 0.25 < inputs.channel_mask_BD.float().mean() < 0.55
        assert not ctc_inputs(OBJECTIVE, [9000], [[5]]).channel_mask_BD.any()

    def test_without_utterances_they_have_no_weight_and_no_loss(self) -> None:
        empty = ctc_inputs(self.OBJECTIVE, [], [])
        assert empty.weights == (0,) and empty.label_lengths_B.tolist() == [0]
        step = StepContext(seed=0, update=0, numbers=(0,))
        sums = self.OBJECTIVE.forward(self.OBJECTIVE.build_model().train(), empty, step=step, training=True)
        sums.total.backward()
        assert sums.total.item() == 0.0

    def test_micro_batches_join(self) -> None:
        one = ctc_inputs(self.OBJECTIVE, [9000], [[5, 6]])
        other = ctc_inputs(self.OBJECTIVE, [7000, 8000], [[7], [8]], number=1)
        both = join([one, other])
        assert both.labels_L.tolist() == [5, 6, 7, 8] and both.labels == (2, 1, 1)
        assert both.audio.utterances == (1, 2) and both.weights == (2, 2)
        assert both.audio.waveforms_BS.shape == (3, 9000) and both.audio.padded
        assert torch.equal(both.audio.mask_BT[1:, : other.audio.mask_BT.shape[1]], other.audio.mask_BT)

    def test_they_travel_between_processes(self) -> None:
        inputs = ctc_inputs(self.OBJECTIVE, [9000, 7000], [[5, 6], [7]])
        batch = MicroBatch(0, inputs, 16_000)
        again = object.__new__(MicroBatch)
        again.__setstate__(batch.__getstate__())
        assert again.weight == 3
        assert same_inputs(batch.inputs, again.inputs)


@pytest.fixture(scope="module")
def model() -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    return OBJECTIVE.build_model()


class TestModel:
    def test_an_utterance_has_the_same_loss_alone_and_padded(self, model: Wav2Vec2ForCTC) -> None:
        sizes, labels = [9000, 6000], [[5, 6, 7], [8, 9]]
        both = ctc_inputs(OBJECTIVE, sizes, labels)
        alone = [ctc_inputs(OBJECTIVE, [size], [each]) for size, each in zip(sizes, labels, strict=True)]
        model.eval()
        with torch.no_grad():
            together, apart = model(both), [model(one) for one in alone]
        assert float(together.total) == pytest.approx(sum(float(one.total) for one in apart), rel=1e-5)
        assert float(together.labels) == 5
        assert float(together.errors) == sum(float(one.errors) for one in apart)

    def test_errors_are_an_edit_distance(self) -> None:
        inputs = ctc_inputs(OBJECTIVE, [2000], [[5, 6, 7]])
        path = torch.tensor([5, 5, 0, 7, 7, 8][: int(inputs.audio.frames_B)])
        logits = torch.nn.functional.one_hot(path, 32).float().unsqueeze(0)
        assert count_errors(logits, inputs, LETTERS)[0] == 2  # 6 is missing, 8 is too many

    def test_word_errors_are_those_of_the_texts(self) -> None:
        """Reference: THE CAT SAT, A DOG. Hypothesis: THE CATSAT, A DOG SAT."""
        texts = {"THE|CAT|SAT": "THE|CATSAT", "A|DOG": "A|DOG|SAT"}
        labels, paths = ([[LETTERS.index(one) for one in text] for text in side] for side in (texts, texts.values()))
        inputs = ctc_inputs(OBJECTIVE, [12_000, 9000], labels)
        logits = torch.zeros(2, inputs.audio.mask_BT.shape[1], 32)
        logits[:, :, BLANK] = 1.0
        for row, path in enumerate(paths):
            logits[row, torch.arange(len(path)) * 2, torch.tensor(path)] = 2.0
        errors, words, word_errors = count_errors(logits, inputs, LETTERS)
        assert (errors, words, word_errors) == (1 + 4, 5, 2 + 1)
        counts = (3.0, 16, 60, 47, errors, words, word_errors)
        sums = CtcSums(*(torch.tensor(float(one)) for one in counts))
        assert OBJECTIVE.metrics(sums)["wer"] == 3 / 5
        nothing = OBJECTIVE.metrics(CtcSums(*torch.zeros(7)))
        assert OBJECTIVE.line(nothing) == "no labels in its utterances"

    def test_the_silence_of_an_empty_micro_batch_has_no_errors(self, model: Wav2Vec2ForCTC) -> None:
        """It is what a rank computes if the validation set has no micro-batch left for it."""
        empty = ctc_inputs(OBJECTIVE, [], [])
        logits = torch.randn(1, empty.audio.mask_BT.shape[1], 32)
        assert count_errors(logits, empty, LETTERS) == (0, 0, 0)
        with torch.no_grad():
            assert [float(one) for one in model.eval()(empty)] == [0.0] * 7

    def test_in_training_there_is_no_word_error_rate(self, model: Wav2Vec2ForCTC) -> None:
        inputs = ctc_inputs(OBJECTIVE, [16_000], [[5, 6, 7]])
        for module, expected in ((model.train(), False), (model.eval(), True)):
            with torch.no_grad():
                assert ("wer" in OBJECTIVE.metrics(module.train(not expected)(inputs))) == expected

    def test_with_a_frozen_encoder_only_the_head_has_gradients(self, model: Wav2Vec2ForCTC) -> None:
        model.train()
        model(ctc_inputs(OBJECTIVE, [16_000], [[5, 6, 7]]), frozen=True).total.backward()
        moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert moved == {"head.weight", "head.bias"}
        model.zero_grad()

    @pytest.mark.parametrize(
        ("update", "worst_case", "frozen"), [(0, False, True), (2, False, False), (0, True, False)]
    )
    def test_the_encoder_is_frozen_for_the_first_updates(
        self, model: Wav2Vec2ForCTC, update: int, worst_case: bool, frozen: bool
    ) -> None:
        objective = objective_with("objective.freeze_encoder_updates=2")
        step = StepContext(seed=0, update=update, numbers=(0,), worst_case=worst_case)
        model.zero_grad()
        inputs = ctc_inputs(objective, [16_000], [[5, 6, 7]])
        objective.forward(model.train(), inputs, step=step, training=True).total.backward()
        assert (model.encoder.transformer.blocks[0].attention.out.weight.grad is None) == frozen
        assert objective.scheduled(update) == {"encoder_frozen": float(update < 2)}

    def test_masks_are_for_training_only(self, model: Wav2Vec2ForCTC) -> None:
        inputs = ctc_inputs(OBJECTIVE, [16_000], [[5, 6, 7]])
        masked = inputs.audio._replace(mask_BT=torch.ones_like(inputs.audio.mask_BT))
        model.eval()
        with torch.no_grad():
            assert float(model(inputs).total) == float(model(inputs._replace(audio=masked)).total)


class TestVocabulary:
    def vocabulary(self, value: object) -> list[str]:
        config = load_config("base", ["objective.name=ctc", f"objective.vocabulary={value}"])
        return list(resolve(config)[0].objective.vocabulary)

    def test_letters_are_those_of_the_published_models(self) -> None:
        assert self.vocabulary("letters") == LETTERS
        assert len(LETTERS) == 32

    def test_a_file_has_a_symbol_on_each_line(self, tmp_path: Path) -> None:
        path = tmp_path / "tokens.txt"
        path.write_text("<pad> 0\n| 1\n\nä 2\n", encoding="utf-8")
        assert self.vocabulary(path) == ["<pad>", "|", "ä"]

    def test_how_texts_are_split_is_resolved(self) -> None:
        for symbols, given, found in (
            ("['<pad>', '|', a, b]", "auto", "longest"),
            ("['<pad>', sil, ax]", "auto", "spaces"),
            ("['<pad>', '|', sil, ax]", "longest", "longest"),
            ("['<pad>', a, b]", "spaces", "spaces"),
        ):
            overrides = ["objective.name=ctc", f"objective.vocabulary={symbols}", f"objective.split={given}"]
            config, objective = load("base", overrides)
            assert config.objective.model_dump()["split"] == found
            assert objective.spaced == (found == "spaces")
            assert resolve(config)[0] == config

    def test_a_list_is_checked_for_a_new_model_and_not_for_a_checkpoint(self) -> None:
        for symbols, message in (("[a, '|', b]", "its first symbol 'a'"), ("['<pad>', a, b]", "no symbol for the sp")):
            overrides = ["objective.name=ctc", f"objective.vocabulary={symbols}"]
            assert len(load("base", overrides, new=False)[1].vocabulary) == 3
            with pytest.raises(UserError, match=message):
                load("base", overrides)
            config, objective = resolve(load_config("base", overrides))
            with pytest.raises(UserError, match=message):
                objective.check(config)
        overrides = ["objective.name=ctc", "objective.vocabulary=['<pad>', '|', a]", "objective.sentencepiece=x.model"]
        with pytest.raises(UserError, match=r"split=spaces: objective\.sentencepiece splits the transcripts"):
            load("base", [*overrides, "objective.split=spaces"])

    def test_a_resolved_vocabulary_needs_no_file(self, tmp_path: Path) -> None:
        path = tmp_path / "tokens.txt"
        path.write_text("<pad>\n|\na\n")
        resolved, _ = resolve(load_config("base", ["objective.name=ctc", f"objective.vocabulary={path}"]))
        path.unlink()
        assert resolve(resolved)[0] == resolved

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("[]", r"objective\.vocabulary is empty; use a fine-tuning preset such as ctc_1h"),
            ("['<pad>']", r"objective\.vocabulary=\['<pad>'\]: has a blank and no other symbol"),
            ("['<pad>', a, a]", r"objective\.vocabulary: 'a' is in it twice"),
            (
                "nothing.txt",
                r"objective\.vocabulary=nothing\.txt: must be `letters` or a readable .*No such file",
            ),
        ],
    )
    def test_one_that_cannot_be_used_is_an_error(self, value: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            self.vocabulary(value)
