"""A folder that appears when it is complete; tests/interop/test_two_at_once.py has two processes that write it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from w2vscale.checkpoint.new_folder import new_folder
from w2vscale.errors import UserError


def test_it_appears_at_the_end_in_place_of_what_a_killed_process_left(tmp_path: Path) -> None:
    output = tmp_path / "a" / "out"
    left = output.with_name(".out.partial")
    left.mkdir(parents=True)
    (left / "half").touch()
    with new_folder(output, size=1) as folder:
        (folder / "file").write_text("whole")
        assert not output.exists()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path("a/out/file")]


def test_an_empty_folder_is_replaced_and_another_one_is_not(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    with new_folder(tmp_path / "0", size=0) as folder:
        (folder / "file").touch()
    assert (tmp_path / "0" / "file").exists()
    (tmp_path / "1" / "mine").touch()
    with pytest.raises(UserError, match="1: exists and is not an empty folder"), new_folder(tmp_path / "1", size=0):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_link_to_an_empty_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/real")
    with new_folder(tmp_path / "link", size=0) as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").rglob("*")) == ["file", "real"]


def test_a_disk_without_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000))
    with (
        pytest.raises(UserError, match=r"out: cannot be written: it needs 3\.0 kB, and the disk has 2\.0 kB free$"),
        new_folder(tmp_path / "out", size=3_000),
    ):
        pytest.fail("the block was entered")
    assert not [*tmp_path.iterdir()]


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    def write(error: Exception) -> None:
        with new_folder(tmp_path / "out", size=0) as folder:
            (folder / "file").touch()
            raise error

    with pytest.raises(UserError, match=r"^the source: unreadable$"):
        write(UserError("the source: unreadable"))
    with pytest.raises(UserError, match="out: cannot be written: No space left"):
        write(OSError(28, "No space left on device"))
    assert not [*tmp_path.iterdir()]
