"""Vocabularies: the formats of files, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from w2vscale.data.vocabulary import (
    LETTERS,
    check_vocabulary,
    graphemes,
    is_spaced,
    read_vocabulary,
    show_symbol,
    unknown_symbol,
)
from w2vscale.errors import UserError

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def read(folder: Path, content: str | bytes, name: str = "symbols.txt") -> list[str]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_vocabulary(path)


class TestFormats:
    def test_a_plain_list_in_any_encoding_and_with_any_line_ends(self, tmp_path: Path) -> None:
        text = "<pad>\r\n<unk>\r\n|\r\n\r\nñ\r\nж \r\n"
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            assert read(tmp_path, text.encode(encoding)) == ["<pad>", "<unk>", "|", "ñ", "ж"]

    def test_a_line_of_a_space_is_the_delimiter(self, tmp_path: Path) -> None:
        assert read(tmp_path, "-\n \no\nk\n") == ["-", "|", "o", "k"]

    def test_symbols_are_nfc(self, tmp_path: Path) -> None:
        decomposed = unicodedata.normalize("NFD", "<pad>\n|\nő\nế\n") + "ɛ̃\n"
        assert read(tmp_path, decomposed) == ["<pad>", "|", "ő", "ế", "ɛ̃"]
        assert read_vocabulary(["<pad>", " ", "o\u030b"]) == ["<pad>", "|", "ő"]

    def test_a_dictionary_of_fairseq_has_the_special_symbols_before_it(self, tmp_path: Path) -> None:
        assert read(tmp_path, "| 94802\nE 51860\nT 38431\n") == [*SPECIAL, "|", "E", "T"]
        assert read(tmp_path, "| 9\nu 8\n<unk> 7 #fairseq:overwrite\n") == [*SPECIAL, "|", "u"]
        assert read(tmp_path, "ih 1\nsil 1\n") == [*SPECIAL, "ih", "sil"]

    def test_symbols_with_their_numbers_are_in_the_order_of_these(self, tmp_path: Path) -> None:
        assert read(tmp_path, "<blk> 0\nq 3\n| 1\nk 2\n") == ["<blk>", "|", "k", "q"]

    def test_vocab_json_has_the_padding_as_the_blank_wherever_it_is(self, tmp_path: Path) -> None:
        last = {"x": 1, "w": 0, " ": 2, "[UNK]": 3, "[PAD]": 4}
        assert read(tmp_path, json.dumps(last), "vocab.json") == ["[PAD]", "w", "x", "|", "[UNK]"]
        first = {"<pad>": 0, "<s>": 1, "|": 2, "o\u0301": 3}
        assert read(tmp_path, json.dumps(first, indent=1)) == ["<pad>", "<s>", "|", "ó"]

    def test_letters(self) -> None:
        assert read_vocabulary(Path("letters")) == LETTERS


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("<pad>\n|\nnew york\nb\n", "line 3 has 2 words, 'new york'; write one symbol per line"),
            ("<pad>\n|\n\t\nb\n", r"line 3 is white space: '\\t'; write a space as \|"),
            ("<pad>\n|\né\ne\u0301\n", "'é' is in it twice"),
            ("a\n|\nb\n", "its first symbol 'a' would be the blank .*; put <pad> before it"),
            ("5\n|\nb\n", "its first symbol '5' would be the blank"),
            ("|\na\nb\n", r"its first symbol '\|' would be the blank"),
            (" \na\nb\n", r"its first symbol '\|' would be the blank"),
            ("▁\na\nb\n", "its first symbol '▁' would be the blank"),
            ("<pad>\na\nb\n", r"no symbol for the space between words; add \| \(in a file, a line with it\), or"),
            ("<pad> 0\n| 1\nb 7\n", "the numbers of its 3 symbols are not 0 to 2, each once"),
            ("<blk> 1\n| 2\na 3\n", "the numbers of its 3 symbols are not 0 to 2, each once"),
            ("<pad> 9\n| 9\na 8\n", "line 1: <pad> in a file of symbols and numbers, which are neither 0, 1, 2"),
            ("<pad>\n", "has a blank and no other symbol"),
            ("", "is empty; use a fine-tuning preset"),
            (b"<pad>\n|\n\xe9\n", r"line 3 is not UTF-8 \(byte 0xe9 at column 1\)"),
            ("{", "not JSON: "),
            ('{"a": 1, "[PAD]": 2}', "the numbers of its 2 symbols are not 0 to 1, each once"),
            ('{"a": 0, "a": 0, "[PAD]": 1}', "the numbers of its 3 symbols are not 0 to 2, each once"),
            ('{"a": 0, "|": 1}', r"has neither \[PAD\] nor <pad>; the blank of CTC"),
            ('{"<pad>": 0, "[PAD]": 1}', r"has both \[PAD\] and <pad>; the blank of CTC"),
            ('{"deu": {"a": 0}}', "'deu' has no number but"),
            ('{"a": true}', "'a' has no number but 'True'"),
            (f"a {'9' * 5000}\n", "line 1 has 2 words, 'a 999"),
            ('{"<pad>": 0, "|": 1, "\\ud800": 2}', "half of a surrogate pair"),
        ],
    )
    def test_a_file_is_named(self, content: str | bytes, message: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path, content)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("objective.vocabulary")

    def test_json_that_is_not_an_object(self, tmp_path: Path) -> None:
        for content in ('["<pad>", "a"]', "7", "<pad>\n|\na\n"):
            with pytest.raises(UserError, match=r"objective\.vocabulary=.*vocab\.json: (must be an object|not JSON)"):
                read(tmp_path, content, "vocab.json")

    def test_a_list_is_checked_apart_so_that_a_checkpoint_opens(self) -> None:
        for symbols, message in (
            (["x", "|", "y"], "its first symbol 'x'"),
            (["<pad>", "x", "y"], "no symbol for the space"),
            (["<pad>", "|", "x y"], "'x y' is empty, or has white space"),
            (["<pad>", "|", "\ud800"], r"'\\ud800' is empty, or has .* half of a surrogate pair"),
        ):
            assert read_vocabulary(symbols) == symbols
            with pytest.raises(UserError, match=rf"^objective\.vocabulary: .*{message}"):
                check_vocabulary(symbols, split="auto")

    def test_two_forms_of_a_letter_are_refused_in_a_new_vocabulary(self) -> None:
        symbols = ["<pad>", "|", "\u00e9", "e\u0301"]
        assert read_vocabulary(symbols) == symbols
        with pytest.raises(UserError, match="'é' is in it twice"):
            check_vocabulary(symbols, split="auto")

    def test_what_needs_no_delimiter(self) -> None:
        check_vocabulary(["<pad>", "▁a", "b"], split="auto")
        check_vocabulary(["<pad>", "▁", "b"], split="auto")
        check_vocabulary(["[PAD]", "sil", "b"], split="auto")
        check_vocabulary(["_", "a", "b"], split="spaces")
        check_vocabulary(["--", "|", "b"], split="auto")
        check_vocabulary(["<|blank|>", "|", "b"], split="auto")

    def test_a_symbol_that_may_be_a_phone_among_letters_is_not_guessed(self) -> None:
        for symbol in ("qu", "\U0001f469\u200d\U0001f680"):
            symbols = ["<pad>", "|", "a", "u", "[noise]", symbol, "b"]
            with pytest.raises(UserError, match="cannot be spelled with its letters, as in phones; set") as caught:
                check_vocabulary(symbols, split="auto")
            assert show_symbol(symbol) in str(caught.value)
            for split in ("longest", "spaces"):
                check_vocabulary(symbols, split=split)


@pytest.mark.parametrize(
    ("symbols", "spaced"),
    [
        (["<pad>", "|", "a", "b"], False),
        (["<pad>", "|", "sil", "a"], True),
        (["<pad>", "|", "s", "c", "h", "sch", "ch"], False),
        (["<pad>", "|", "ɔ̃", "s"], False),
        (["<pad>", "|", "ɔ̃", "s", "ɔ̃s"], False),
        (["<pad>", "|", "कि", "[noise]", "<SIL>"], False),
        (["sil", "|", "a"], False),  # the blank
        (["<pad>", "▁the", "sil"], False),
    ],
)
def test_symbols_that_cannot_be_spelled_are_phones(symbols: list[str], spaced: bool) -> None:
    assert is_spaced(symbols) == spaced
    assert is_spaced(symbols, split="spaces") and not is_spaced(symbols, split="longest")


def test_the_unknown_symbol_has_any_of_its_names() -> None:
    assert unknown_symbol(["<pad>", "[UNK]", "a"]) == "[UNK]"
    assert unknown_symbol(["<unk>", "a"]) is None  # the blank


def test_a_letter_and_its_marks_are_one() -> None:
    assert graphemes("ɔ̃b̥\u0301a") == ["ɔ̃", "b̥\u0301", "a"]


def test_invisible_symbols_are_shown_with_code_points() -> None:
    assert show_symbol("é") == "'é'"
    assert show_symbol("\u200b") == "'\\u200b' (U+200B)"
    assert show_symbol("ɔ̃").endswith("(U+0254 U+0303)")
