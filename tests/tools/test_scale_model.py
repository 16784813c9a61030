"""The arithmetic of scale_model.py, and that it runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.helpers.hosts import missing_for_hosts
from tools import scale_model
from tools.scaling.growth import MEASURED, dealt, efficiency, predict, preset_model
from tools.scaling.validation import Trial, compared, measure, read_record
from w2vscale.errors import UserError
from w2vscale.planning.links import CLUSTERS, Cluster, Group, Kind, Link, collective_seconds, replica_group, shard_group
from w2vscale.planning.prediction import Setting
from w2vscale.planning.rates import measured_rates
from w2vscale.planning.traffic import NCCL, Pace, Task, buckets_of, ends, sharding_of, update_of
from w2vscale.planning.work import Model

SLOW = Cluster("", 4, inside=Link(100.0, 1.0), across=Link(10.0, 3.0), flops=8e14, memory=80e9)


@pytest.fixture(scope="module")
def base() -> Model:
    """The preset `base`."""
    return preset_model("base")


@pytest.mark.parametrize(
    ("kind", "algorithm", "group", "seconds"),
    [
        ("all_gather", "ring", Group(4, 4), 3 / 4 * 400 / 100 + 3 * 1.0),
        ("all_reduce", "ring", Group(4, 4), 2 * (3 / 4 * 400 / 100 + 3 * 1.0)),
        ("reduce_scatter", "ring", Group(8, 4), 7 / 8 * 400 / 10 + 6 * 1.0 + 3.0),  # 7 hops, one to another node
        ("all_reduce", "tree", Group(8, 4), 2 * 400 / 10 + 2 * (3.0 + 2 * 1.0)),
        ("all_gather", "tree", Group(4, 4), 3 / 4 * 400 / 100 + 2 * 1.0),
        # Inside a node as the ring; across, a quarter of the data over a quarter of the links.
        ("all_reduce", "hierarchical", Group(8, 4), 2 * (3.0 + 3.0) + 2 * (1 / 2 * 100 / 2.5 + 3.0)),
        ("all_gather", "hierarchical", Group(4, 4), 3 / 4 * 400 / 100 + 3 * 1.0),
        ("all_gather", "ring", Group(1, 1), 0.0),
    ],
)
def test_seconds_of_collectives(kind: Kind, algorithm: str, group: Group, seconds: float) -> None:
    assert collective_seconds(kind, 400.0, group, SLOW, algorithm) == pytest.approx(seconds)  # type: ignore[arg-type]
    assert collective_seconds(kind, 400.0, group, SLOW, "fastest") <= seconds


def test_groups_of_hybrid_sharding_share_the_links_of_a_node() -> None:
    assert shard_group(16, 4, SLOW) == Group(4, 4, 1.0)
    assert replica_group(16, 4, SLOW) == Group(4, 1, 0.25)  # four such groups at once
    assert replica_group(16, 2, SLOW) == Group(8, 2, 0.5)
    assert shard_group(16, 8, SLOW) == Group(8, 4, 1.0)
    assert replica_group(16, 8, SLOW) == Group(2, 1, 0.25)


def test_tasks_of_one_resource_follow_each_other_and_wait_for_others() -> None:
    tasks = [
        Task("device", (), 2.0),
        Task("device", (), 3.0),
        Task("all", (0,), kind="all_reduce", size=4.0),  # while the device goes on
        Task("all", (1,), kind="all_reduce", size=1.0),  # links are busy until 6
        Task("device", (3,), 0.5),
    ]
    assert ends(tasks, lambda task: task.size) == [2.0, 5.0, 6.0, 7.0, 7.5]


def test_parameters_and_operations_are_counted(base: Model) -> None:
    assert base.parameters == 95_044_608  # Transformers' Wav2Vec2ForPreTraining
    assert base.flops == pytest.approx(46e9, rel=0.02)  # the roofline of the architecture
    assert len(base.units) == 2 + 12 + 1 and math.isclose(sum(map(base.share, base.units)), 1.0)
    block = base.units[2]
    assert block.elements == 4 * 768 * 769 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert [unit.whole for unit in base.units] == [True, True, *[False] * 13]
    assert sum(elements for elements, _ in base.backward) == base.parameters


def test_padding_of_shards(base: Model) -> None:
    block = base.units[2]
    assert block.padded(3) == block.elements and block.padded(768) == block.elements
    assert block.padded(1024) > 1.3 * block.elements * 768 / 1024
    assert block.padded_flat(1000) - block.elements < 1000 * len(block.shapes)


def test_buckets_have_their_size(base: Model) -> None:
    for over in (True, False):
        buckets = buckets_of(base, 1_000_000, 7_000_000, over=over)
        assert sum(elements for elements, _ in buckets) == base.parameters
        units = [unit for _, unit in buckets]
        assert units == sorted(units, reverse=True) and units[-1] == 0
        assert all((elements >= 7_000_000) == over for elements, _ in buckets[1:-1])


def test_without_latency_and_with_fast_links_ddp_only_computes(base: Model) -> None:
    sharding = sharding_of("ddp", base, 64, per_node=8)
    tasks = update_of(base, sharding, forwards=3, pace=Pace(1.0, 2.0, 0.1), backend=NCCL)
    assert ends(tasks, lambda task: 0.0)[-1] == pytest.approx(9.1)
    # Slow ones: all buckets but those before the first unit of the last backward wait for each other.
    slow = ends(tasks, lambda task: 1.0)[-1]
    buckets = sum(task.kind is not None for task in tasks)
    assert 9.1 + 1.0 < slow < 9.1 + buckets


def test_a_batch_dealt_to_more_gpus(base: Model) -> None:
    setting = Setting(CLUSTERS["h100"], "fastest", measured_rates(MEASURED)["base"])
    rows = dealt(base, "ddp", [1, 2, 4, 8, 16, 32, 64, 128], setting)
    assert [row.ranks for row in rows] == [1, 2, 4, 8, 16, 32, 64]  # 64 micro-batches
    # One GPU is what was measured, less the share of an update that its optimizer step has in long updates.
    assert rows[0].audio_per_second == pytest.approx(6_077, rel=0.06)
    assert efficiency(rows[0], setting) == pytest.approx(1.0)
    assert all(efficiency(row, setting) <= 1.0 for row in rows)
    assert rows[3].gpu_hours == pytest.approx(8 * 24 * rows[3].days)
    # One micro-batch: the host launches kernels for longer than the GPU computes.
    assert rows[-1].seconds == rows[-1].host > rows[-1].computing
    slow = predict(base, "ddp", 64, 1, Setting(CLUSTERS["cloud"], "fastest", setting.rates))
    # At least the time in which a node receives the other nodes' sums of all gradients.
    assert slow.seconds > 2 * 7 / 8 * 4 * base.parameters / CLUSTERS["cloud"].across.bandwidth


def test_the_recorded_updates_are_predicted_within_a_fifth() -> None:
    points, trial, _ = read_record()
    rows = [row for row in compared(points, trial) if row["hosts"] > 1]
    assert {(row["hosts"], row["megabits"]) for row in rows} == {
        (hosts, speed) for hosts in (2, 3) for speed in trial.speeds
    }
    assert len(trial.speeds) == 2 and {row["engine"] for row in rows} >= {"ddp", "fsdp", "zero2"}
    for row in rows:
        assert row["error"] < 0.2, row
        assert row["predicted_sent"] == pytest.approx(row["sent"], rel=0.02)


def test_it_predicts_and_draws(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(scale_model.main)
    options = ["--preset", "base", "--engine", "ddp", "--engine", "hsdp", "--plot", str(tmp_path / "scaling.png")]
    result = CliRunner().invoke(app, [*options, "--gpus-per-node", "4", "--inside", "300", "--across", "100"])
    assert result.exit_code == 0, result.output
    assert "changed to 4 GPUs per node, 300 GB/s inside, 100 Gb/s across" in result.stdout
    figures = json.loads(result.stdout.splitlines()[-1])
    assert 0 < figures["max_relative_error"] < 0.2
    of_ddp = figures["predictions"]["base"]["ddp"]
    assert [row["gpus"] for row in of_ddp["batch_that_grows"]] == [2**power for power in range(11)]
    assert of_ddp["batch_of_the_preset"][0]["days"] > 7 * of_ddp["batch_of_the_preset"][3]["days"]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    wrong = CliRunner().invoke(app, ["--cluster", "b200"])
    assert wrong.exit_code == 2 and "b200: not one of h100" in wrong.output


@pytest.mark.parametrize("content", ['{"phases": {}}', '{"phases": {"rates_base": [], "rates_large": []}}', "[]"])
def test_what_is_no_result_of_the_gpu_bench_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(UserError, match=r"gpu\.json: not a result"):
        measured_rates(tmp_path / "gpu.json")


def test_rates_are_those_of_the_longest_forward_that_fitted(tmp_path: Path) -> None:
    """Operations of 624 s in the window of the record: 98.6 ms in one forward, 106.1 ms in two."""
    document = json.loads(MEASURED.read_text())
    rows = document["phases"]["rates_base"]
    one, two = (rows[f"compiled/{form}/equal"] for form in ("40x15.6s", "20x15.6s"))
    flops = 624.0 * one["flops_per_second"] / one["audio_per_second"]
    whole = measured_rates(MEASURED)["base"]
    assert whole.flops == pytest.approx(flops / (one["window_ms"] / 1000))
    for kind in ("eager", "compiled"):
        rows[f"{kind}/40x15.6s/equal"] = {"error": "CUDA out of memory"}
    (tmp_path / "gpu.json").write_text(json.dumps(document))
    part = measured_rates(tmp_path / "gpu.json")["base"]
    assert part.flops == pytest.approx(flops / (two["window_ms"] / 1000))
    assert part.host == whole.host


@pytest.mark.long
@pytest.mark.distributed
def test_updates_on_hosts_with_slow_links_are_measured() -> None:
    """How near the prediction is depends on what else this machine does; what is sent does not."""
    if missing := missing_for_hosts():
        pytest.skip(missing)
    trial = Trial(engines=("ddp", "fsdp"), speeds=(200.0, 600.0), seconds=1.0, updates=3)
    points = measure(trial, hosts=(1, 2))
    rows = list(compared(points, trial))
    assert [(row["engine"], row["hosts"], row["megabits"]) for row in rows] == [
        ("ddp", 1, 0.0), ("fsdp", 1, 0.0),
        *((engine, 2, speed) for engine in ("ddp", "fsdp") for speed in (200.0, 600.0)),
    ]  # fmt: skip
    for row in rows:
        assert row["predicted"] > 0
        if row["hosts"] > 1:
            assert row["sent"] == pytest.approx(row["predicted_sent"], rel=0.02)
