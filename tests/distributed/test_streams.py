"""Streams of shards under several ranks with loader processes: none runs dry, none waits for another."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro, train_with_loader_processes
from w2vscale.corpora.shar import write_shards

pytestmark = pytest.mark.distributed

STREAM = ("data.mode=stream", "batch.micro_batches=6", "trainer.updates=8")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of six utterances, of which one is silent."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [write_audio(folder / f"u{n:02d}.flac", noise(1.0 + 0.1 * (n % 9), seed=n)) for n in range(24)]
    manifest = write_manifest(folder / "cuts.jsonl", [cut_of(path) for path in paths])
    write_shards(manifest, folder / "shards", shard_size=6)
    return folder / "shards"


def test_three_ranks_with_two_processes_each_share_four_shards_and_make_every_update(
    shards: Path, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    pool(3).run(train_with_loader_processes, str(shards), str(tmp_path), (*STREAM, "data.workers=2"), timeout=120)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["update"] for record in records] == list(range(1, 9))
    assert all(record["loss"] and record["masked_fraction"] > 0.3 for record in records)


def test_a_streaming_run_goes_on_at_its_update_with_another_number_of_ranks(
    shards: Path, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    pool(3).run(train_micro, str(shards), str(tmp_path), STREAM, timeout=100)
    pool(2).run(train_micro, str(shards), str(tmp_path), (*STREAM, "trainer.updates=11"), timeout=100)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["update"] for record in records] == list(range(1, 12))


def test_ranks_and_a_continued_run_name_bad_audio_once(tmp_path: Path, pool: Callable[[int], Pool]) -> None:
    paths = [write_audio(tmp_path / f"u{n:02d}.flac", noise(1.0 + 0.1 * (n % 9), seed=n)) for n in range(24)]
    manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
    write_text(paths[4])
    paths[9].unlink()
    for updates in (4, 8):
        settings = ("data.max_bad_fraction=0.5", f"trainer.updates={updates}")
        pool(2).run(train_micro, str(manifest), str(tmp_path / "exp"), settings, timeout=100)
    lines = (tmp_path / "exp" / "logs" / "bad_audio.jsonl").read_text().splitlines()
    assert Counter(json.loads(line)["utterance"] for line in lines) == {"u04": 1, "u09": 1}
