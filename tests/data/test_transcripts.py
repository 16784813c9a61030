"""Labels of transcripts."""

from __future__ import annotations

import unicodedata
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.cut import Cut

from w2vscale.data.audio import AudioError
from w2vscale.data.letter_case import change_case
from w2vscale.data.transcripts import Transcripts, labels_to_text, refuse_overhang, refuse_too_many, transcript
from w2vscale.data.vocabulary import BLANK, LETTERS


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


def decoded(spelling: Transcripts, vocabulary: list[str], text: str, *, spaced: bool = False) -> str:
    labels, unknown = spelling.encode(text)
    assert not unknown
    return labels_to_text(labels, vocabulary, spaced=spaced)


def symbols(vocabulary: list[str], text: str, **settings: bool) -> tuple[list[str], str]:
    """The symbols of a text, and what is unknown."""
    labels, unknown = Transcripts(vocabulary, **settings).labels(text)
    return [vocabulary[label] for label in labels], unknown


class TestUnicode:
    WORDS = "été crème brûlée Ångström ĺekár ữ"

    def test_composed_and_decomposed_are_the_same_on_either_side(self) -> None:
        text = unicodedata.normalize("NFC", self.WORDS).lower()
        found = set()
        for form, other in product(("NFC", "NFD"), repeat=2):
            vocabulary = ["<pad>", "|", *(unicodedata.normalize(form, letter) for letter in sorted({*text} - {" "}))]
            spelling = Transcripts(vocabulary)
            labels, unknown = spelling.labels(unicodedata.normalize(other, self.WORDS))
            assert not unknown and labels_to_text(labels, vocabulary) == text == spelling.normalised(self.WORDS)
            found.add(tuple(labels))
        assert len(found) == 1

    def test_a_combining_sequence_can_be_a_symbol(self) -> None:
        vocabulary = ["<pad>", "<unk>", "|", "ɔ̃", "ɔ", "b"]
        assert symbols(vocabulary, "bɔ̃ bɔ") == (["b", "ɔ̃", "|", "b", "ɔ"], "")

    def test_a_letter_with_an_unknown_mark_is_an_unknown_letter(self) -> None:
        vocabulary = ["<pad>", "<unk>", "|", "ɔ", "b", "bɔ"]
        assert symbols(vocabulary, "ɔ̃b") == (["<unk>", "b"], "ɔ̃")
        assert symbols(vocabulary, "bɔ̃ bɔ") == (["b", "<unk>", "|", "bɔ"], "ɔ̃")

    def test_a_mark_can_be_a_symbol_of_its_own(self) -> None:
        vocabulary = ["<pad>", "<unk>", "|", "ẹ", "o", "\u0301"]
        assert symbols(vocabulary, "ẹ́ ó") == (["ẹ", "\u0301", "|", "o", "\u0301"], "")
        assert decoded(Transcripts(vocabulary), vocabulary, "Ẹ́ Ó") == "ẹ\u0301 ó"

    def test_white_space_of_any_kind_is_one_space_and_other_invisible_characters_are_named(self) -> None:
        assert symbols(["<pad>", "<unk>", "|", "a"], "a\u00a0\u3000a\u200ba") == (
            ["a", "|", "a", "<unk>", "a"],
            "\u200b",
        )


class TestSpecialSymbols:
    @pytest.mark.parametrize("name", ["<s>", "</s>", "<unk>", "<pad>"])
    def test_they_are_not_in_a_text(self, name: str) -> None:
        found, unknown = symbols(LETTERS, f"a {name} b")
        assert found == ["A", "|", *["<unk>"] * name.count("<"), *found[3:]] and {"<", ">"} <= set(unknown)
        assert name not in found[:2] + found[-2:]

    def test_the_unknown_symbol_of_transformers(self) -> None:
        vocabulary = ["[PAD]", "[UNK]", "|", "a", "b"]
        assert symbols(vocabulary, "AB, ba") == (["a", "b", "[UNK]", "|", "b", "a"], ",")

    def test_a_bar_is_not_a_space_and_neither_is_the_mark_of_pieces(self) -> None:
        assert symbols(["-", "<unk>", "|", "a"], "a|a a") == (["a", "<unk>", "a", "|", "a"], "|")
        assert symbols(["-", "<unk>", "▁", "a"], "a▁a a") == (["a", "<unk>", "a", "▁", "a"], "▁")

    def test_a_checkpoint_with_two_forms_of_a_letter_has_labels_and_text(self) -> None:
        vocabulary = ["<pad>", "|", "\u00e9", "e\u0301"]
        assert decoded(Transcripts(vocabulary), vocabulary, "\u00e9 e\u0301") == "\u00e9 \u00e9"

    def test_a_bar_in_a_longer_symbol_is_no_space(self) -> None:
        vocabulary = ["<|blank|>", "|", "<|noise|>", "a"]
        assert decoded(Transcripts(vocabulary), vocabulary, "a <|noise|>") == "a <|noise|>"

    def test_other_names_in_brackets_are_found_as_they_are(self) -> None:
        vocabulary = ["<pad>", "<unk>", "|", "[NOISE]", "a", "n"]
        assert symbols(vocabulary, "An [NOISE] a") == (["a", "n", "|", "[NOISE]", "|", "a"], "")
        assert symbols(vocabulary, "[noise]")[1] == "[]eios"


class TestSymbolsOfSeveralCharacters:
    def test_the_longest_matches(self) -> None:
        vocabulary = ["<pad>", "|", *"schatl", "sch", "ch"]
        assert symbols(vocabulary, "Schatt lachts") == (
            ["sch", "a", "t", "t", "|", "l", "a", "ch", "t", "s"],
            "",
        )

    def test_phones_are_separated_by_spaces(self) -> None:
        vocabulary = ["<pad>", "<unk>", "|", "sil", "dh", "ax", "t"]
        assert symbols(vocabulary, " sil DH  ax t") == (["sil", "dh", "ax", "t"], "")
        assert symbols(vocabulary, "dh axr t zh sil") == (["dh", "<unk>", "t", "<unk>", "sil"], "axr zh")
        assert Transcripts(vocabulary).normalised("DH  AXR") == "dh AXR"
        assert decoded(Transcripts(vocabulary), vocabulary, "sil t", spaced=True) == "sil t"
        with pytest.raises(AudioError, match="has 'axr', which is not"):
            Transcripts(["<pad>", "sil", "t"]).labels("sil axr")

    def test_case_distinguishes_phones_that_differ_in_nothing_else(self) -> None:
        assert symbols(["<pad>", "<unk>", "tS", "s", "S", "b"], "s S tS B") == (["s", "S", "tS", "<unk>"], "B")

    def test_the_setting_decides(self) -> None:
        vocabulary = ["<pad>", "<unk>", "|", "t", "h", "th"]
        assert symbols(vocabulary, "th t h") == (["th", "|", "t", "|", "h"], "")
        assert symbols(vocabulary, "th t h", spaced=True) == (["th", "t", "h"], "")

    def test_a_bar_between_phones_stays_one(self) -> None:
        vocabulary = ["<pad>", "|", "hh", "ah"]
        assert decoded(Transcripts(vocabulary), vocabulary, "hh ah | hh", spaced=True) == "hh ah | hh"


LETTER = st.sampled_from([*"abzäößéñőçşđжώ中5'-", "ɔ̃", "ẹ\u0301", "ı", "i", "ʃ", "र", "कि", "ς", "\u0301"])
SYMBOL = st.one_of(LETTER, LETTER.map(str.upper), st.lists(LETTER, min_size=2, max_size=3).map("".join))
TEXT = st.lists(st.one_of(LETTER, LETTER.map(str.upper), st.just(" "), st.characters(exclude_categories=["Cs"])))


@st.composite
def vocabularies(draw: st.DrawFn) -> list[str]:
    composed = (unicodedata.normalize("NFC", symbol) for symbol in draw(st.lists(SYMBOL, min_size=1, max_size=40)))
    return list(dict.fromkeys(["<pad>", "<unk>", "|", *composed]))


class TestAnyVocabularyAndTranscript:
    @given(vocabularies(), TEXT.map("".join), st.booleans())
    def test_labels_give_the_text_or_name_what_is_unknown(self, vocabulary: list[str], text: str, spaced: bool) -> None:
        spelling = Transcripts(vocabulary, spaced=spaced)
        normalised = spelling.normalised(text)
        labels, unknown = spelling.encode(text)
        assert BLANK not in labels and len(unknown) == labels.count(1)
        assert spelling.encode(normalised) == (labels, unknown)
        left = iter(unknown)
        parts = [next(left) if label == 1 else vocabulary[label] for label in labels]
        if spaced:
            assert unicodedata.normalize("NFC", " ".join(parts)) == normalised
        else:
            spelled = "".join(" " if label == 2 else part for label, part in zip(labels, parts, strict=True))
            assert unicodedata.normalize("NFC", spelled) == normalised
        if not unknown:
            assert labels_to_text(labels, vocabulary, spaced=spaced) == normalised

    @given(vocabularies(), TEXT.map("".join), st.booleans())
    def test_normal_forms_give_the_same_labels(self, vocabulary: list[str], text: str, spaced: bool) -> None:
        found = [
            Transcripts([unicodedata.normalize(of_symbols, symbol) for symbol in vocabulary], spaced=spaced).encode(
                unicodedata.normalize(of_text, text)
            )
            for of_symbols, of_text in product(("NFC", "NFD"), repeat=2)
        ]
        assert all(one == found[0] for one in found)

    @given(st.text("abçğıiöşü zñéåþøđőß", min_size=1), st.booleans(), st.randoms(use_true_random=False))
    def test_letters_of_either_case_give_the_same_labels(self, text: str, turkish: bool, random: Random) -> None:
        letters = {*"abçğiöşüzñéåþøđőß"} | ({"ı"} if turkish else set())
        text = text if turkish else text.replace("ı", "z")
        varied = "".join(change_case(one, random.choice(["upper", "lower"]), turkish=turkish) for one in text)
        for case in ("lower", "upper"):
            vocabulary = ["<pad>", "<unk>", "|"]
            vocabulary += sorted({change_case(letter, case, turkish=turkish) for letter in letters})
            spelling = Transcripts(vocabulary)
            assert spelling.encode(varied) == spelling.encode(text)
            assert not spelling.encode(text)[1]


class TestCut:
    def cut(self, *parts: tuple[float, float, str | None], seconds: float = 4.0) -> Cut:
        recording = Recording("r", [], 16_000, round(seconds * 16_000), seconds)
        supervisions = [
            SupervisionSegment(f"s{n}", "r", start, duration, text=text)
            for n, (start, duration, text) in enumerate(parts)
        ]
        return MonoCut("u", 0.0, seconds, 0, supervisions, recording=recording)

    def test_its_transcript_is_in_the_order_of_time(self) -> None:
        assert transcript(self.cut((2.0, 1.0, "world"), (3.0, 1.0, None), (0.5, 1.0, "hello"))) == "hello world "

    @pytest.mark.parametrize("part", [(-0.2, 1.0, "a"), (3.5, 0.7, "a")])
    def test_text_outside_of_the_audio_is_refused(self, part: tuple[float, float, str]) -> None:
        with pytest.raises(
            AudioError, match=rf"has text from {part[0]:.2f} to .* but lasts from 0 to 4\.00 s"
        ) as caught:
            refuse_overhang(self.cut((1.0, 1.0, "b"), part))
        assert caught.value.kind == "overhanging text"

    def test_rounded_times_and_silence_are_not(self) -> None:
        refuse_overhang(self.cut((-0.08, 4.15, "a"), (3.5, 9.0, " "), (-5.0, 1.0, None)))

    def test_windows_of_lhotse_have_text_that_is_not_in_their_audio(self) -> None:
        cut = self.cut((0.2, 1.5, "one"), (1.8, 0.5, "two"), (2.5, 1.0, "three"))
        windows = list(cut.cut_into_windows(2.0))
        refused = []
        for window in windows:
            try:
                refuse_overhang(window)
            except AudioError as error:
                refused.append(str(error))
        assert refused == [
            "has text from 1.80 to 2.30 s, but lasts from 0 to 2.00 s",
            "has text from -0.20 to 0.30 s, but lasts from 0 to 2.00 s",
        ]
