"""What is faster or smaller learns the same: compiled blocks, joined micro-batches, recomputed activations."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lhotse import CutSet

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro, train_where_one_rank_cannot_read
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine import Engine
from w2vscale.training import calibration

pytestmark = pytest.mark.distributed

TWENTY = (
    *(f"model.{name}=0.0" for name in ("dropout", "attention_dropout", "input_dropout", "feature_dropout")),
    "trainer.updates=20", "checkpoint.every=1000", "data.max_seconds=1.5", "batch.max_seconds=4",
)  # fmt: skip
BF16 = ("precision.compute=bf16", "optim.lr=1e-4")

Curve = list[float]


@pytest.fixture(scope="module")
def train(pool: Callable[[int], Pool], small_corpus: SmallCorpus) -> Callable[..., Curve]:
    def run(exp: Path, *settings: str) -> Curve:
        # One process where there is something to compile, since each compiles for itself.
        processes = 1 if any("compile" in setting for setting in settings) else 2
        return pool(processes).run(train_micro, str(small_corpus.train), str(exp), (*TWENTY, *settings))[0]

    return run


@pytest.fixture(scope="module")
def plain(train: Callable[..., Curve], tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return train(tmp_path_factory.mktemp("plain") / "exp")


@pytest.mark.parametrize(
    "settings",
    [
        ("batch.concat=auto",),
        ("batch.pad_to=bucket",),
        ("engine.activation_checkpointing=features",),
        ("engine.compile=true",),
        ("engine={name: fsdp, compile: true}", "batch.concat=2"),
        ("engine={name: deepspeed, deepspeed_config: zero2, compile: true}", "batch.concat=auto"),
    ],
    ids="+".join,
)
def test_the_curve_is_the_same(
    train: Callable[..., Curve], plain: Curve, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    if "deepspeed" in settings[0] and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    found = train(tmp_path, *settings)
    assert len(plain) == 20
    assert found == pytest.approx(plain, rel=1e-5)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    if graphs := [record["compiled_graphs"] for record in records if "compiled_graphs" in record]:
        # After the first pass over the buckets, nothing is compiled.
        assert graphs[0] > 0 and graphs[10:] == [graphs[10]] * 10


def test_in_bf16(train: Callable[..., Curve], tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", *BF16)
    fast = train(tmp_path / "fast", *BF16, "engine.compile=true", "batch.concat=2", "batch.pad_to=bucket")
    assert fast == pytest.approx(plain, rel=1e-2)


class TestCalibration:
    def test_ranks_agree_where_one_cannot_read_what_the_others_can(
        self, pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path
    ) -> None:
        """FSDP2 has collectives in every forward: ranks that took another number of them would wait for ever."""
        longest = max(CutSet.from_file(small_corpus.train), key=lambda cut: cut.duration).id
        settings = (*TWENTY, "trainer.updates=3", "schedule.warmup_updates=1", "batch.concat=auto", "engine.name=fsdp")
        settings += ("batch.micro_batches=8", "data.max_bad_fraction=1", "regularization.layerdrop=0")
        (_, first), (_, second) = pool(2).run(
            train_where_one_rank_cannot_read, longest, str(small_corpus.train), str(tmp_path), settings, timeout=60.0
        )
        assert first == second

    def test_it_is_kept_with_the_run_and_holds_under_the_same_conditions(
        self, small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = (*TWENTY, "trainer.updates=2", "schedule.warmup_updates=1", "batch.concat=auto")
        apart = train_micro(str(small_corpus.train), str(tmp_path / "apart"), (*settings, "batch.concat=1"))
        assert train_micro(str(small_corpus.train), str(tmp_path / "auto"), settings) == pytest.approx(apart, rel=1e-5)
        kept = tmp_path / "auto" / calibration.FILE
        (most,) = json.loads(kept.read_text())["capacities"]
        assert most["width"] == 24_000 and most["samples"] == 4 * 48_000  # all four micro-batches of the window
        measured = kept.stat().st_mtime_ns
        shutil.rmtree(tmp_path / "auto" / "checkpoints")
        train_micro(str(small_corpus.train), str(tmp_path / "auto"), settings)
        assert kept.stat().st_mtime_ns == measured
        shutil.rmtree(tmp_path / "auto" / "checkpoints")
        counts: list[int] = []
        take = calibration._take

        def counted(engine: Engine, example: MicroBatch, *, joined: int, most: int) -> None:
            counts.append(joined)
            take(engine, example, joined=joined, most=most)

        monkeypatch.setattr(calibration, "_take", counted)
        monkeypatch.setattr(calibration, "memory_limit", lambda device, processes: 0)
        train_micro(str(small_corpus.train), str(tmp_path / "auto"), (*settings, "batch.micro_batches=5"))
        assert json.loads(kept.read_text())["capacities"][0]["samples"] == 48_000
        assert set(counts) == {1}  # where there is no room for two, two are not tried
