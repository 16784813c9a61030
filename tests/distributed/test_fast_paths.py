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
from tests.helpers.calibrating import BASE, EACH, made_up_memory, per_forward_on_a_gpu
from tests.helpers.micro import MICRO_RUN, THREE_CONVOLUTIONS
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_calibrated, train_micro, train_where_one_rank_cannot_read
from tests.helpers.tiers import long
from w2vscale.config import load_config
from w2vscale.data.indexed import MicroBatches
from w2vscale.distributed.process_group import Ranks
from w2vscale.training import calibration
from w2vscale.training import dry_run as dry_run_module
from w2vscale.training.dry_run import dry_run
from w2vscale.training.run import Run, build_run

pytestmark = pytest.mark.distributed

TWENTY = (
    *(f"regularization.{name}=0.0" for name in ("dropout", "attention_dropout", "input_dropout")),
    "objective.feature_dropout=0.0",
    "trainer.updates=20", "checkpoint.every=1000", "data.max_seconds=1.5", "batch.max_seconds=4",
    THREE_CONVOLUTIONS, "model.layers=2",
)  # fmt: skip
BF16 = ("precision.compute=bf16", "optim.lr=1e-4")

Curve = list[float]


@pytest.fixture(scope="module")
def train(pool: Callable[[int], Pool], small_corpus: SmallCorpus) -> Callable[..., Curve]:
    def run(exp: Path, *settings: str) -> Curve:
        # One process where there is something to compile, since each compiles for itself: minutes on a busy machine.
        processes, timeout = (1, 900.0) if any("compile" in setting for setting in settings) else (2, 240.0)
        task = train_calibrated if "batch.concat=auto" in settings else train_micro
        overrides = (*TWENTY, *settings)
        return pool(processes).run(task, str(small_corpus.train), str(exp), overrides, timeout=timeout)[0]

    return run


@pytest.fixture(scope="module")
def plain(train: Callable[..., Curve], tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return train(tmp_path_factory.mktemp("plain") / "exp")


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    "settings",
    [
        ("batch.concat=auto",),
        ("batch.pad_to=bucket",),
        ("engine.activation_checkpointing=features",),
        long(("engine={name: fsdp, compile: true}", "batch.concat=2")),
        long(("engine={name: deepspeed, deepspeed_config: zero2, compile: true}", "batch.concat=auto")),
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


@pytest.mark.long
@pytest.mark.timeout(1000)
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
        settings += (
            "batch.micro_batches=16",
            "batch.same_bucket=4",
            "data.max_bad_fraction=1",
            "regularization.layerdrop=0",
        )
        first, second = pool(2).run(
            train_where_one_rank_cannot_read, longest, str(small_corpus.train), str(tmp_path), settings, timeout=60.0
        )
        assert first == second == 4

    @pytest.fixture
    def run(self, small_corpus: SmallCorpus, tmp_path: Path) -> Callable[..., Run]:
        """A run in one folder, with these settings."""

        def build(*settings: str) -> Run:
            series_of_four = ("batch.micro_batches=16", "batch.same_bucket=4")
            overrides = [*MICRO_RUN, *TWENTY, *series_of_four, f"data.train={small_corpus.train}", *settings]
            config = load_config("base", overrides)
            tmp_path.joinpath("exp").mkdir(exist_ok=True)
            device = torch.device("cpu")
            return build_run(
                config, tmp_path / "exp", ranks=Ranks(), device=device, resume="auto", log=lambda text: None
            )

        return build

    @pytest.mark.parametrize(
        ("available", "fitting"),
        [(0, 1), (BASE + 2 * EACH - 1, 1), (BASE + 2 * EACH, 2), (BASE + 4 * EACH - 1, 2), (BASE + 4 * EACH, 4)],
    )
    def test_the_largest_divisor_of_a_series_that_fits(
        self, run: Callable[..., Run], available: int, fitting: int
    ) -> None:
        """A series has four micro-batches, and each takes the same memory."""
        built, logged = run(), []
        assert built.training_set.series_length == 4
        limit = math.ceil(available / calibration.SHARE)
        with made_up_memory(limit) as forwards:
            on_a_gpu = replace(built, device=torch.device("cuda", 0))
            assert calibration.micro_batches_per_forward(on_a_gpu, logged.append) == fitting
        # A size that may not fit is not tried, and one that was tried is known to fit.
        assert set(forwards) == {size for size in (1, 2, 4) if size <= fitting}
        assert len(logged) == 1 and "measuring" in logged[0]

    def test_memory_that_grows_faster_than_predicted_is_noticed(self) -> None:
        """The peak of one is not of its activations; four take more than two predict."""
        memory = {0: 100, 1: 500, 2: 510, 4: 1200, 8: 3000}
        taken: list[int] = []

        def peak(device: torch.device, work: Callable[[], object]) -> int:
            taken.append(0)
            work()
            return memory[taken[-1]]

        def largest(limit: int) -> int:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(calibration, "peak_memory", peak)
                patched.setattr(calibration, "memory_limit", lambda device: limit / calibration.SHARE)
                return calibration._largest_fitting(taken.append, [1, 2, 4, 8], torch.device("cpu"))

        assert [largest(limit) for limit in (899, 900, 1199, 1200, 2579, 2580, 3000)] == [1, 2, 2, 4, 4, 4, 8]

    def test_it_measures_the_largest_and_the_longest(
        self, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        built, measured = run("batch.max_seconds=6", "data.max_seconds=4"), []
        note = lambda take, sizes, device: measured.append(take.args[2].number) or 4  # noqa: E731
        monkeypatch.setattr(calibration, "_largest_fitting", note)
        assert per_forward_on_a_gpu(built) > 1
        assert isinstance(built.training_set, MicroBatches)
        plan = built.training_set.plan
        assert plan.largest() != plan.longest()
        assert measured == [plan.largest(), plan.longest()]

    def test_without_series_nothing_is_measured(self, run: Callable[..., Run]) -> None:
        with made_up_memory(10**9) as forwards:
            assert per_forward_on_a_gpu(run("batch.same_bucket=1")) == 1
        assert not forwards

    def test_it_leaves_the_model_as_it_was(self, run: Callable[..., Run]) -> None:
        built = run()
        before = {name: tensor.clone() for name, tensor in built.engine.export_state().items()}
        assert per_forward_on_a_gpu(built) == 4
        assert all(torch.equal(tensor, before[name]) for name, tensor in built.engine.export_state().items())

    def test_it_is_kept_with_the_run_and_holds_under_the_same_conditions(self, run: Callable[..., Run]) -> None:
        def measure(*settings: str, limit: int = 10**9) -> tuple[int, list[int]]:
            built = replace(run(*settings), device=torch.device("cuda", 0))
            with made_up_memory(limit) as forwards:
                return calibration.micro_batches_per_forward(built, lambda text: None), forwards

        first, forwards = measure()
        assert first == 4 and forwards
        again, forwards = measure(limit=0)
        assert again == 4 and not forwards
        other, forwards = measure("batch.micro_batches=32", limit=0)
        assert other == 1 and forwards

    def test_a_number_is_taken_as_it_is(self, run: Callable[..., Run]) -> None:
        logged: list[str] = []
        assert per_forward_on_a_gpu(run("batch.concat=3"), limit=0, log=logged.append) == 3
        assert not logged

    def test_on_a_cpu_each_micro_batch_runs_alone(self, run: Callable[..., Run]) -> None:
        built, logged = run(), []
        assert calibration.micro_batches_per_forward(built, logged.append) == 1
        assert not logged
        assert not (built.exp / calibration.FILE).exists()

    def test_a_dry_run_measures_too(self, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
        config = run().config
        assert (found := dry_run(config)) is not None and found.per_forward == 1
        monkeypatch.setattr(dry_run_module, "forward_size", lambda *arguments, **named: 4)
        assert (found := dry_run(config)) is not None and found.per_forward == 4
