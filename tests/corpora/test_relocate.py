"""Manifests of audio that was moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from w2vscale.corpora.relocate import relocate
from w2vscale.corpora.validate import validate_manifest
from w2vscale.data.manifest import Manifest
from w2vscale.errors import UserError


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two files in old/, and one in old-too/."""
    paths = [tmp_path / name for name in ("old/é/a.wav", "old/b.wav", "old-too/c.wav")]
    return write_manifest(tmp_path / "cuts.jsonl", [cut_of(write_audio(path, noise(1.0))) for path in paths])


def test_paths_below_the_old_folder_change(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(tmp_path / "old", tmp_path / "new place")
    assert validate_manifest(manifest).bad == 2
    monkeypatch.chdir(tmp_path)
    assert relocate(manifest, Path("old"), Path("new place/")) == (2, 0, 1)
    assert validate_manifest(manifest, audio=True).bad == 0
    assert Manifest(manifest).cut(0).recording.sources[0].source == str(tmp_path / "new place" / "é" / "a.wav")
    assert Manifest(manifest).cut(2).recording.sources[0].source == str(tmp_path / "old-too" / "c.wav")


def test_mistakes_leave_the_manifest_as_it_was(manifest: Path, tmp_path: Path) -> None:
    before = manifest.read_bytes()
    with pytest.raises(UserError, match=r"no file in it is below .*/elsewhere; its first path is .*/old/é/a.wav"):
        relocate(manifest, tmp_path / "elsewhere", tmp_path / "new")
    with pytest.raises(UserError, match=r"/new/é/a.wav would be its first file: no such file"):
        relocate(manifest, tmp_path / "old", tmp_path / "new")
    assert manifest.read_bytes() == before
    with pytest.raises(UserError, match="no such manifest"):
        relocate(tmp_path / "no.jsonl", tmp_path / "old", tmp_path / "new")


def test_files_that_did_not_move_along_are_counted(manifest: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "old", tmp_path / "new")
    (tmp_path / "new" / "b.wav").unlink()
    assert relocate(manifest, tmp_path / "old", tmp_path / "new") == (2, 1, 1)
