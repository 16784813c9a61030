"""The counts of labels and unknown symbols in transcripts."""

from __future__ import annotations

from collections.abc import Iterator

from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.cut import Cut

from w2vscale.data.label_counts import count_labels
from w2vscale.data.transcripts import Transcripts

RECORDING = Recording("r", [], 16_000, 32_000, 2.0)


def cuts(*texts: str, seconds: float = 2.0) -> Iterator[Cut]:
    for number, text in enumerate(texts):
        spoken = SupervisionSegment(f"s{number}", "r", 0.0, seconds, text=text)
        yield MonoCut(f"u{number}", 0.0, 2.0, 0, [spoken], recording=RECORDING)


def test_unknown_symbols_are_named_by_frequency() -> None:
    spelling = Transcripts(["<pad>", "<unk>", "|", *"abc"])
    found = count_labels(spelling, cuts("ab c", "x\u200bx", ""))
    assert found.describe("<unk>") == (
        "7 labels in 2 transcripts, 42.86% of them <unk>: 'x' 2, '\\u200b' (U+200B) 1; utterances left out: "
        "1 without a transcript"
    )
    many = count_labels(spelling, cuts("defghijklmno"))
    assert many.unknown_share == 1.0 and many.describe("<unk>").endswith("'m' 1, 2 others")


def test_without_a_symbol_for_them_their_utterances_are_left_out() -> None:
    found = count_labels(Transcripts(["<pad>", "|", *"abc"]), cuts("ab c", "x", "a"))
    assert found.describe(None) == (
        "6 labels in 3 transcripts, 16.67% of them not in objective.vocabulary: 'x' 1; utterances left out: "
        "1 with symbols that are unknown, and no <unk> in the vocabulary"
    )
    assert count_labels(Transcripts(["<pad>", "|", "a"]), cuts("A")).describe(None) == (
        "1 label in 1 transcript, none of them unknown"
    )


def test_text_outside_of_the_audio_is_not_counted() -> None:
    found = count_labels(Transcripts(["<pad>", "|", "a"]), cuts("aa", seconds=3.0))
    assert (found.labels, found.overhanging) == (0, 1)
    assert "1 with text that is not in their audio" in found.describe(None)
