"""Text files in any encoding, and the nearest path."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w2vscale.errors import UserError
from w2vscale.files import NAMES_COMPARED, nearest_path, read_text

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", ["zwei Töne\n", "ein Wort \r\nнаука и\n", "一 二\n", ""])
def test_unicode_is_recognised(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "a.txt") == text


@given(text=st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn"))))
def test_utf_8_is_never_taken_for_something_else(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    assert read_text(path) == text.removeprefix("\ufeff")


def test_other_bytes_name_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("eins\nzwei Töne\n".encode("latin-1"))
    message = re.escape(f"{path}: line 2 is not UTF-8 (byte 0xf6 at column 7); convert the file")
    with pytest.raises(UserError, match=message):
        read_text(path)
    assert read_text(path, encoding="latin-1") == "eins\nzwei Töne\n"
    with pytest.raises(UserError, match="no encoding has the name 'latin-99'"):
        read_text(path, encoding="latin-99")


def test_a_cut_off_character_and_zero_bytes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("eins\nzwei Tö".encode()[:-1])
    with pytest.raises(UserError, match=r"line 2 is not UTF-8 \(ends in the middle of a character\)"):
        read_text(path)
    path.write_bytes("eins\n".encode("utf-16")[:-1])
    with pytest.raises(UserError, match=r"line 1 is not UTF-16 \(ends in the middle of a character\)"):
        read_text(path)
    path.write_bytes(b"RIFF\0\0\1data")
    with pytest.raises(UserError, match="line 1 has a zero byte: it is not text"):
        read_text(path)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("exp/bsae", "exp/base"),
        ("exp/Base", "exp/base"),
        ("exp/bsae/checkpoints/latest", "exp/base/checkpoints/latest"),
        ("exp/bsae/checkpoints/update_3", "exp/base"),
        ("exp/base/checkpoint/latest", "exp/base/checkpoints/latest"),
        ("ex/base", "exp/base"),
        ("./exp/../cuts_trian.jsonl", "exp/../cuts_train.jsonl"),
        ("cuts.train.jsonl", "cuts_train.jsonl"),
        ("cuts_train.jsonl ", "cuts_train.jsonl"),
        ("exp/quite_another", None),
        ("nowhere/base", None),
        ("cuts_train.jsonl", None),
        ("cuts_train.jsonl/below", None),
        ("exp/base/checkpoints", None),
        ("exp", None),
        (".", None),
        ("..", None),
        ("", None),
        ("/", None),
        ("\0", None),
        ("\udcff", None),
        ("x" * 300, None),
    ],
)
def test_the_nearest_path(given: str, nearest: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("exp/base/checkpoints/latest").mkdir(parents=True)
    Path("cuts_train.jsonl").touch()
    hint = f"; did you mean {nearest}?" if nearest else ""
    assert nearest_path(given) == nearest_path(Path(given)) == hint
    if given and not given.startswith((".", "/")):
        assert nearest_path(tmp_path / given) == hint.replace(str(nearest), str(tmp_path / (nearest or "")))


def test_the_nearest_path_compares_few_names_of_a_large_folder(tmp_path: Path) -> None:
    for number in range(NAMES_COMPARED + 1):
        (tmp_path / f"name{number}").touch()
    with os.scandir(tmp_path) as entries:
        *_, last = [entry.name for entry in entries]
    with os.scandir(tmp_path) as entries:
        first = next(entries).name
    assert nearest_path(tmp_path / f"{first}_") == f"; did you mean {tmp_path / first}?"
    assert last not in nearest_path(tmp_path / f"{last}_")
