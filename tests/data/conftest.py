"""A small corpus as a manifest and in shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from w2vscale.corpora.shar import write_shards


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 utterances of 0.5 to 4.4 seconds."""
    folder = tmp_path_factory.mktemp("stream")
    cuts = [cut_of(write_audio(folder / f"u{n:02d}.flac", noise(0.5 + 0.1 * n, seed=n))) for n in range(40)]
    return write_manifest(folder / "cuts.jsonl", cuts)


@pytest.fixture(scope="module")
def shards(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same utterances in four shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(manifest, folder, shard_size=10)
    return folder


@pytest.fixture
def three(manifest: Path, tmp_path: Path) -> Path:
    """Three shards of at most 14 utterances."""
    write_shards(manifest, tmp_path, shard_size=14)
    return tmp_path
