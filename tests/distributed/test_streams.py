"""Streams of shards under several ranks with loader processes: every update is the same, also after a kill."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.launched import HOLD, Launched
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro, train_until_killed, train_with_loader_processes
from w2vscale.corpora.shar import write_shards

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)
from tests.distributed.test_whole_checkpoints import assert_same_bits, assert_whole

pytestmark = pytest.mark.distributed

STREAM = (
    *("data.mode=stream", "data.stream_buffer=8", "batch.micro_batches=6", "batch.max_seconds=4", "trainer.updates=12"),
    *("checkpoint.every=6", "checkpoint.keep_last=99"),
)
"""An epoch has several blocks and ends within a few updates."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of six utterances."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [write_audio(folder / f"u{n:02d}.flac", noise(1.0 + 0.1 * (n % 9), seed=n)) for n in range(24)]
    manifest = write_manifest(folder / "cuts.jsonl", [cut_of(path) for path in paths])
    write_shards(manifest, folder / "shards", shard_size=6)
    return folder / "shards"


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    train_micro(str(shards), str(folder), STREAM)
    return folder


def losses(exp: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (exp / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (3, 2)])
def test_the_curve_does_not_depend_on_the_number_of_processes(
    alone: Path, shards: Path, tmp_path: Path, pool: Callable[[int], Pool], processes: int, workers: int
) -> None:
    settings = (*STREAM, f"data.workers={workers}")
    pool(processes).run(train_with_loader_processes, str(shards), str(tmp_path), settings, timeout=200)
    found, expected = losses(tmp_path), losses(alone)
    assert len(found) == 12 and found == pytest.approx(expected, rel=1e-5)


def test_a_run_continues_on_another_number_of_processes(
    alone: Path, shards: Path, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    split = tmp_path / "split"
    shutil.copytree(alone, split, symlinks=True)
    (split / "checkpoints" / "latest").unlink()
    shutil.rmtree(split / "checkpoints" / "update_00000012")
    pool(2).run(train_micro, str(shards), str(split), STREAM, timeout=100)
    expected = losses(alone)
    assert losses(split)[:6] == expected[:6]
    assert losses(split) == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
def test_a_killed_run_continues_bit_for_bit(shards: Path, tmp_path: Path, pool: Callable[[int], Pool]) -> None:
    settings = (*STREAM, "trainer.updates=6", "checkpoint.every=1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pool(2).run(train_micro, str(shards), str(whole), settings)
    with pytest.raises(AssertionError, match="the process died"):
        pool(2).run(train_until_killed, str(shards), str(killed), settings, 3)
    pool(2).run(train_micro, str(shards), str(killed), settings)
    assert_whole(killed, updates=6)
    assert_same_bits(killed, whole)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_with_loader_processes_that_is_killed_after_each_update(shards: Path, tmp_path: Path) -> None:
    """SIGKILL of launcher and ranks, by turns with the checkpoint complete, half written, or not begun."""
    kills = 2
    settings = (*STREAM, f"trainer.updates={kills + 1}", "schedule.warmup_updates=2")
    settings += ("checkpoint.every=1", "data.workers=1")

    def launched(name: str, *, hold: int | None = None) -> Launched:
        (tmp_path / name).mkdir(exist_ok=True)
        return Launched(shards, tmp_path / name, settings=settings, sitecustomize=HOLD, hold=hold)

    with launched("whole") as run:
        run.finish(600.0)
    whole, killed = tmp_path / "whole" / "exp", tmp_path / "killed" / "exp"
    for update in range(1, kills + 1):
        newest = killed / "checkpoints" / f"update_{update:08d}" if update % 2 == 0 else None
        with launched("killed", hold=update) as run:
            printed = run.kill_once_held(committed=newest)
        assert "skipping unusable checkpoint" not in printed
    with launched("killed") as run:
        assert f"at update {kills}\n" in run.finish(600.0)
    assert_whole(killed, updates=kills + 1)
    assert_same_bits(killed, whole)
    assert losses(killed) == losses(whole)


@pytest.mark.parametrize("mode", ["index", "stream"])
def test_ranks_and_a_continued_run_name_bad_audio_once(mode: str, tmp_path: Path, pool: Callable[[int], Pool]) -> None:
    paths = [write_audio(tmp_path / f"u{n:02d}.flac", noise(1.0 + 0.1 * (n % 9), seed=n)) for n in range(24)]
    manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
    bad = {"u04": 1, "u09": 1}
    source = manifest
    if mode == "stream":
        source = tmp_path / "shards"
        write_shards(manifest, source, shard_size=6)
        bad = blank(source / "recording.000001.tar")
    else:
        write_text(paths[4])
        paths[9].unlink()
    for updates in (4, 8):
        settings = (f"data.mode={mode}", "data.max_bad_fraction=0.5", f"trainer.updates={updates}")
        pool(2).run(train_micro, str(source), str(tmp_path / "exp"), settings, timeout=100)
    lines = (tmp_path / "exp" / "logs" / "bad_audio.jsonl").read_text().splitlines()
    assert Counter(json.loads(line)["utterance"] for line in lines) == bad


def blank(archive: Path) -> dict[str, int]:
    """Overwrite the contents of an archive with zeros; returns the names of its utterances."""
    with tarfile.open(archive) as members:
        names = {Path(name).stem for name in members.getnames()}
    archive.write_bytes(bytes(archive.stat().st_size))
    return dict.fromkeys(names, 1)
