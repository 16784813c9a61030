"""Labels of transcripts."""

from __future__ import annotations

import pytest

from w2vscale.data.audio import AudioError
from w2vscale.data.transcripts import Transcripts, refuse_too_many
from w2vscale.objectives.ctc import LETTERS


class TestTranscripts:
    def test_a_label_is_a_place_in_the_vocabulary_and_a_space_is_a_bar(self) -> None:
        labels, unknown = Transcripts(LETTERS).labels("  it's  A\tB ")
        assert [LETTERS[label] for label in labels] == list("IT'S|A|B")
        assert unknown == ""

    def test_case_follows_the_vocabulary(self) -> None:
        assert Transcripts(["-", "|", "a", "ä"]).labels("Ä A")[0] == [3, 1, 2]
        assert Transcripts(["-", "|", "a", "A", "<unk>"]).labels("A a")[0] == [3, 1, 2]

    def test_other_characters_become_unknown_and_are_reported(self) -> None:
        labels, unknown = Transcripts(LETTERS).labels("A-É")
        assert labels == [LETTERS.index("A"), LETTERS.index("<unk>"), LETTERS.index("<unk>")]
        assert unknown == "-É"

    @pytest.mark.parametrize(
        ("text", "reason"), [("", "has no transcript"), (" ", "has no"), ("a?", r"has '\?', which")]
    )
    def test_a_text_without_labels_is_an_error(self, text: str, reason: str) -> None:
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
