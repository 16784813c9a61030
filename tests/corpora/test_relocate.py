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
    assert relocate([manifest, manifest], Path("old"), Path("new place/")) == {manifest: (2, 0, 1)}
    assert validate_manifest(manifest, audio=True).bad == 0
    assert Manifest(manifest).cut(0).recording.sources[0].source == str(tmp_path / "new place" / "é" / "a.wav")
    assert Manifest(manifest).cut(2).recording.sources[0].source == str(tmp_path / "old-too" / "c.wav")


def test_mistakes_leave_the_manifest_as_it_was(manifest: Path, tmp_path: Path) -> None:
    before = manifest.read_bytes()
    with pytest.raises(UserError, match=r"no file in it is below .*/elsewhere; its first path is .*/old/é/a.wav"):
        relocate([manifest], tmp_path / "elsewhere", tmp_path / "new")
    with pytest.raises(UserError, match=r"/new/é/a.wav would be its first file: no such file"):
        relocate([manifest], tmp_path / "old", tmp_path / "new")
    assert manifest.read_bytes() == before
    with pytest.raises(UserError, match="no such manifest"):
        relocate([tmp_path / "no.jsonl"], tmp_path / "old", tmp_path / "new")


def test_files_that_did_not_move_along_are_counted(manifest: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "old", tmp_path / "new")
    (tmp_path / "new" / "b.wav").unlink()
    assert relocate([manifest], tmp_path / "old", tmp_path / "new") == {manifest: (2, 1, 1)}


def test_a_mistake_in_one_manifest_leaves_all_as_they_were(manifest: Path, tmp_path: Path) -> None:
    other = write_manifest(tmp_path / "other.jsonl", [cut_of(write_audio(tmp_path / "else" / "d.wav", noise(1.0)))])
    shutil.move(tmp_path / "old", tmp_path / "new")
    before = manifest.read_bytes()
    with pytest.raises(UserError, match=rf"^{other}: no file in it is below {tmp_path}/old; its first path is "):
        relocate([manifest, other], tmp_path / "old", tmp_path / "new")
    assert manifest.read_bytes() == before
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"cuts.jsonl", "other.jsonl"}
    assert not [*tmp_path.glob(".*.partial")]


def test_relative_paths_change_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_audio(tmp_path / "old" / "a.wav", noise(1.0))
    manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(Path("old/a.wav"))])
    shutil.move("old", "new")
    with pytest.raises(UserError, match=r"below /.*/old; its first path is old/a.wav; give OLD as it begins there$"):
        relocate([manifest], tmp_path / "old", tmp_path / "new")
    assert relocate([manifest], Path("old"), Path("new")) == {manifest: (1, 0, 0)}
    assert Manifest(manifest).cut(0).recording.sources[0].source == "new/a.wav"
