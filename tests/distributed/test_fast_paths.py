"""What is faster or smaller learns the same: compiled blocks, joined micro-batches, recomputed activations."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lhotse import CutSet

from tests.helpers.audio import SmallCorpus
from tests.helpers.calibrating import BASE, EACH, grouping_on_a_gpu, made_up_memory
from tests.helpers.micro import MICRO_RUN
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_calibrated, train_micro, train_where_one_rank_cannot_read
from w2vscale.config import load_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.engine.accumulation import Capacity, FittingGrouping, FixedGrouping, Grouping
from w2vscale.training import calibration
from w2vscale.training.run import Run, build_run

pytestmark = pytest.mark.distributed

TWENTY = (
    *(f"regularization.{name}=0.0" for name in ("dropout", "attention_dropout", "input_dropout")),
    "objective.feature_dropout=0.0",
    "trainer.updates=20", "checkpoint.every=1000", "data.max_seconds=1.5", "batch.max_seconds=4",
)  # fmt: skip
BF16 = ("precision.compute=bf16", "optim.lr=1e-4")

Curve = list[float]


@pytest.fixture(scope="module")
def train(pool: Callable[[int], Pool], small_corpus: SmallCorpus) -> Callable[..., Curve]:
    def run(exp: Path, *settings: str) -> Curve:
        # One process where there is something to compile, since each compiles for itself.
        processes = 1 if any("compile" in setting for setting in settings) else 2
        task = train_calibrated if "batch.concat=auto" in settings else train_micro
        return pool(processes).run(task, str(small_corpus.train), str(exp), (*TWENTY, *settings))[0]

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
    """With memory that is made up: a CPU has no limit that could be measured."""

    def test_ranks_agree_where_one_cannot_read_what_the_others_can(
        self, pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path
    ) -> None:
        """FSDP2 has collectives in every forward: ranks that took another number of them would wait for ever."""
        longest = max(CutSet.from_file(small_corpus.train), key=lambda cut: cut.duration).id
        settings = (*TWENTY, "trainer.updates=3", "schedule.warmup_updates=1", "engine.name=fsdp")
        settings += ("batch.micro_batches=8", "data.max_bad_fraction=1", "regularization.layerdrop=0")
        first, second = pool(2).run(
            train_where_one_rank_cannot_read, longest, str(small_corpus.train), str(tmp_path), settings, timeout=60.0
        )
        # All eight micro-batches share a forward on one process; on two, four.
        assert first == second == FittingGrouping((Capacity(24_000, 4 * 48_000),))

    @pytest.fixture
    def run(self, small_corpus: SmallCorpus, tmp_path: Path) -> Callable[..., Run]:
        """A run in one folder, with these settings."""

        def build(*settings: str) -> Run:
            overrides = [*MICRO_RUN, *TWENTY, f"data.train={small_corpus.train}", "batch.concat=auto", *settings]
            config = load_config("base", overrides)
            tmp_path.joinpath("exp").mkdir(exist_ok=True)
            device = torch.device("cpu")
            return build_run(
                config, tmp_path / "exp", ranks=Ranks(), device=device, resume="auto", log=lambda text: None
            )

        return build

    @pytest.mark.parametrize(
        ("available", "fitting"),
        [(0, 1), (BASE + 2 * EACH - 1, 1), (BASE + 2 * EACH, 2), (BASE + 3 * EACH + 99, 3), (10**9, 4)],
    )
    def test_as_many_as_the_memory_of_two_says(self, run: Callable[..., Run], available: int, fitting: int) -> None:
        """Each further micro-batch takes as much as the second; a window has four."""
        built = run()
        limit = math.ceil(available / calibration.SHARE)
        with made_up_memory(limit) as forwards:
            found = calibration.grouping_of(replace(built, device=torch.device("cuda", 0)), lambda text: None)
        assert found == FittingGrouping((Capacity(24_000, fitting * 48_000),))
        # Where there may be no room for two, two are not tried.
        assert set(forwards) == ({1} if fitting == 1 else {1, 2})

    def test_it_leaves_the_model_as_it_was(self, run: Callable[..., Run]) -> None:
        built = run()
        before = {name: tensor.clone() for name, tensor in built.engine.export_state().items()}
        grouping_on_a_gpu(built)
        assert all(torch.equal(tensor, before[name]) for name, tensor in built.engine.export_state().items())

    def test_it_is_kept_with_the_run_and_holds_under_the_same_conditions(self, run: Callable[..., Run]) -> None:
        def measure(*settings: str, limit: int = 10**9) -> tuple[Grouping, list[int]]:
            built = replace(run(*settings), device=torch.device("cuda", 0))
            with made_up_memory(limit) as forwards:
                return calibration.grouping_of(built, lambda text: None), forwards

        first, forwards = measure()
        assert forwards
        again, forwards = measure(limit=0)
        assert again == first and not forwards
        other, forwards = measure("batch.micro_batches=5", limit=0)
        assert other == FittingGrouping((Capacity(24_000, 48_000),)) and forwards

    def test_on_a_cpu_each_micro_batch_runs_alone(self, run: Callable[..., Run]) -> None:
        built, said = run(), []
        assert calibration.grouping_of(built, said.append) == FixedGrouping(1)
        assert said == ["batch.concat=auto: using 1, because larger forwards are not faster on a CPU"]
        assert not (built.exp / calibration.FILE).exists()
