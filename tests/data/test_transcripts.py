"""From text to labels, and the inputs of fine-tuning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.config.tree import LETTERS
from w2vscale.data.audio import AudioError
from w2vscale.data.inputs import concatenate_ctc
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.transcripts import Transcripts, make_ctc_inputs, refuse_too_many

CONFIG = load_config(
    "base",
    [
        *MICRO_MODEL,
        "objective.name=ctc",
        "objective.vocabulary=letters",
        "objective.channel_mask_probability=0.5",
        "objective.channel_mask_length=8",
    ],
)


def noises(*sizes: int) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    return [np.random.default_rng(size).standard_normal(size).astype(np.float32) for size in sizes]


class TestTranscripts:
    def test_characters_are_numbered_and_spaces_are_bars(self) -> None:
        labels, unknown = Transcripts(LETTERS).labels("  it's  A\tB ")
        assert [LETTERS[label] for label in labels] == list("IT'S|A|B")
        assert unknown == ""

    def test_case_follows_the_vocabulary(self) -> None:
        assert Transcripts(["-", "|", "a", "ä"]).labels("Ä A")[0] == [3, 1, 2]
        assert Transcripts(["-", "|", "a", "A", "<unk>"]).labels("A a")[0] == [3, 1, 2]

    def test_what_is_not_in_it_is_unknown_and_named(self) -> None:
        labels, unknown = Transcripts(LETTERS).labels("A-É")
        assert labels == [LETTERS.index("A"), LETTERS.index("<unk>"), LETTERS.index("<unk>")]
        assert unknown == "-É"

    @pytest.mark.parametrize(
        ("text", "reason"), [("", "has no transcript"), (" ", "has no"), ("a?", r"has '\?', which")]
    )
    def test_what_cannot_be_spelled(self, text: str, reason: str) -> None:
        with pytest.raises(AudioError, match=reason):
            Transcripts(["-", "|", "a"]).labels(text)

    def test_the_blank_is_never_a_label(self) -> None:
        assert Transcripts(["-", "|", "a", "<unk>"]).labels("a-a") == ([2, 3, 2], "-")
        with pytest.raises(AudioError, match="has '-', which is not"):
            Transcripts(["-", "|", "a"]).labels("a-a")

    def test_labels_need_a_frame_each_and_a_blank_between_equal_ones(self) -> None:
        refuse_too_many([1, 2, 2, 3], 5)
        with pytest.raises(AudioError, match="its 4 frames are too few for the 4 labels"):
            refuse_too_many([1, 2, 2, 3], 4)


class TestInputs:
    def test_draws_follow_from_the_place_alone(self) -> None:
        audio, labels = noises(9000, 7000, 8000), [[5, 6], [7], [8, 9, 10]]
        whole = make_ctc_inputs(audio, labels, [0, 1, 2], number=4, seed=3, config=CONFIG)
        left_out = make_ctc_inputs(
            [audio[0], audio[2]], [labels[0], labels[2]], [0, 2], number=4, seed=3, config=CONFIG
        )
        assert torch.equal(whole.mask_BT[[0, 2]], left_out.mask_BT)
        assert torch.equal(whole.channel_mask_BD[[0, 2]], left_out.channel_mask_BD)
        assert left_out.labels_L.tolist() == [5, 6, 8, 9, 10] and left_out.label_lengths_B.tolist() == [2, 3]
        assert (whole.weights, whole.utterances, whole.padded) == ((6,), (3,), True)

    def test_frames_and_channels_are_masked(self) -> None:
        inputs = make_ctc_inputs(noises(*[32_000] * 30), [[5]] * 30, range(30), number=0, seed=0, config=CONFIG)
        assert 0.4 < inputs.mask_BT.float().mean() < 0.6
        share = inputs.channel_mask_BD.float().mean()
        assert 0.25 < share < 0.55
        none = CONFIG.model_copy(update={"ctc": CONFIG.ctc.model_copy(update={"channel_mask_probability": 0.0})})
        plain = make_ctc_inputs(noises(9000), [[5]], [0], number=0, seed=0, config=none)
        assert not plain.channel_mask_BD.any()

    def test_nothing_weighs_nothing(self) -> None:
        empty = make_ctc_inputs([], [], [], number=0, seed=0, config=CONFIG)
        assert empty.weights == (0,) and empty.label_lengths_B.tolist() == [0]

    def test_micro_batches_join(self) -> None:
        one = make_ctc_inputs(noises(9000), [[5, 6]], [0], number=0, seed=0, config=CONFIG)
        other = make_ctc_inputs(noises(7000, 8000), [[7], [8]], [0, 1], number=1, seed=0, config=CONFIG)
        both = concatenate_ctc([one, other])
        assert both.labels_L.tolist() == [5, 6, 7, 8] and both.labels == (2, 2) and both.utterances == (1, 2)
        assert both.waveforms_BS.shape == (3, 9000) and both.padded
        assert torch.equal(both.mask_BT[1:, : other.mask_BT.shape[1]], other.mask_BT)

    def test_they_travel_between_processes(self) -> None:
        inputs = make_ctc_inputs(noises(9000, 7000), [[5, 6], [7]], [0, 1], number=0, seed=0, config=CONFIG)
        batch = MicroBatch(0, 0, inputs, 16_000)
        again = object.__new__(MicroBatch)
        again.__setstate__(batch.__getstate__())
        assert again.weight == 3
        for mine, theirs in zip(batch.inputs, again.inputs, strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
