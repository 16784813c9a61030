"""`w2vscale plan`, and what `--dry-run` prints of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.helpers.commands import error_of
from tests.helpers.micro import MICRO_RUN
from tests.helpers.passes import passes_run_once
from tests.helpers.semantics import WithTeacher
from w2vscale.cli.app import app
from w2vscale.errors import UserError
from w2vscale.objectives import OBJECTIVES
from w2vscale.planning import plan
from w2vscale.planning.links import CLUSTERS

ROWS = re.compile(r"^ (\S+) +(none|features|selective|full) +(.*)$", re.MULTILINE)
SMALL = ("data.workers=0", "batch.max_seconds=8", "batch.micro_batches=2", "data.max_seconds=2", "data.min_seconds=1")


@pytest.fixture(autouse=True, scope="module")
def _passes() -> Iterator[None]:
    with passes_run_once():
        yield


def test_it_prints_all_settings_and_recommends_one(run: Callable[..., str], corpus: Path) -> None:
    """A million updates of two micro-batches of 24 utterances of 2 s."""
    settings = [*SMALL, f"data.train={corpus}", "trainer.updates=1000000", "schedule.warmup_updates=1000"]
    printed = run("plan", "tiny", *settings, "--gpus", 2, "--gpu-memory", 24)
    first, second, *lines = printed.splitlines()
    assert first == "tiny: 2,324,288 parameters, fp32"
    assert second.startswith("An update: 2 micro-batches of up to 8 s, ") and second.endswith("epochs of data.train")
    assert max(len(line.rstrip()) for line in lines if not line.startswith("warning")) <= 125
    rows = ROWS.findall(printed)
    assert len(rows) == 8 * 4
    assert {engine for engine, _, _ in rows} == {
        "ddp", "fsdp", "zero1", "zero2", "zero3", "fsdp_offload", "zero2_offload", "zero3_offload",
    }  # fmt: skip
    for engine, _, numbers in rows:
        cells = numbers.replace("–", "0.0").split()
        assert float(cells[5]) == pytest.approx(sum(map(float, cells[:5])), abs=0.26)  # rounded to 0.1
        assert (len(cells) == 13) == engine.endswith("offload")  # which needs host memory
    recommended = printed.partition("Recommended: ddp, recompute=none")[2]
    assert recommended.partition("Settings to type:\n")[2].startswith("  none: these are the settings of the run\n")
    assert "GPU-hours" in printed and "s of audio per second" in printed
    assert "1.5 GB for CUDA and NCCL" in printed and "65% of the roofline (800 TFLOP/s" in printed
    assert re.search(r"^warning: trainer.updates=1000000 amounts to [\d,]+ epochs of data.train", printed, re.MULTILINE)


def test_a_batch_that_cannot_be_divided_among_the_gpus(run: Callable[..., str]) -> None:
    printed = run("plan", "tiny", *SMALL, "batch.micro_batches=4", "--gpus", 3, "--gpu-memory", 24)
    assert "batch.micro_batches=4 is not a multiple of 3 GPUs: planned with 3, which changes the audio of" in printed
    assert "an update by -25.0%" in printed
    assert "batch.micro_batches=3" in printed.split("Settings to type:")[1]


def test_nothing_fits(run: Callable[..., str]) -> None:
    printed = run("plan", "tiny", *SMALL, "--gpus", 1, "--gpu-memory", 1.51)
    assert re.search(r"Nothing fits\. \w+ with recompute=\w+ needs [\d.]+ GB more per GPU; more GPUs do not", printed)
    assert "Settings to type" not in printed


def test_bandwidths_and_host_memory_can_be_stated(run: Callable[..., str]) -> None:
    """2,324,288 gradients of 4 bytes pass the 1 Gb/s of a node once in each direction, at 80 % of it."""
    links = ("--inside", 300, "--across", 1, "--host-memory", 0)
    printed = run("plan", "tiny", *SMALL, "batch.micro_batches=16", "--gpus", 16, "--gpu-memory", 24, *links)
    assert "changed to 300 GB/s inside, 1 Gb/s across\n" in printed
    assert "240 GB/s per GPU inside a node, 0.1 GB/s per node across" in printed
    rows = {(engine, recomputation): numbers for engine, recomputation, numbers in ROWS.findall(printed)}
    seconds = float(rows["ddp", "none"].split()[-3])
    assert seconds == pytest.approx(4 * 2_324_288 / (0.8e9 / 8), abs=0.01)
    assert "does not fit: fsdp_offload, recompute=none: needs 0.0 GB more host memory per node" in printed
    assert len(rows["fsdp_offload", "none"].split()) == 7  # the memory alone


def test_offloading_says_how_much_host_memory_it_needs(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SIMPLEST", ("zero3_offload",))
    printed = run("plan", "tiny", *SMALL, "--gpus", 1, "--gpu-memory", 24)
    assert "It needs 0 GB of host memory per node. Settings to type:" in printed
    assert "\n  engine.name=deepspeed engine.deepspeed_config=zero3_offload\n" in printed


def test_the_help_names_all_clusters() -> None:
    shown = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    assert "|".join(CLUSTERS) in shown


def test_errors_are_one_line(tmp_path: Path) -> None:
    def error(*arguments: object) -> str:
        return error_of("plan", *arguments)

    on = ("--gpus", 4, "--gpu-memory", 80)
    assert error("tiny", *on, "--cluster", "b200").startswith("--cluster b200: choose one of h100, ")
    assert error("tiny", *on, "--cluster", "v100").startswith("--cluster v100: choose one of ")  # has no bf16
    assert error("tiny", *on, "--nodes", 3) == "--gpus 4: cannot be spread evenly over 3 nodes; set --nodes"
    assert "neither a file nor a preset" in error("tyny", *on)
    assert error("tiny", "data.train=no.jsonl", *on) == "no.jsonl: no such manifest"
    (tmp_path / "gpu.json").write_text("{}")
    assert "not a result of tools/bench/gpu.py" in error("tiny", *on, "--rates", tmp_path / "gpu.json")
    for option in ("--gpu-memory", "--host-memory", "--inside", "--across"):
        for value in ("inf", "1e308"):
            found = error("tiny", *on, option, value)
            assert found.startswith(f"{option} {float(value):g}: must be a finite number")
        with pytest.raises((UserError, typer.BadParameter)):  # by the range in new versions of Typer
            error("tiny", *on, option, "nan")


def test_a_dry_run_predicts_its_memory_and_warns_of_its_epochs(
    run: Callable[..., str], corpus: Path, tmp_path: Path
) -> None:
    settings = [*SMALL, f"data.train={corpus}", "trainer.updates=1000000", "schedule.warmup_updates=1000"]
    printed = " ".join(run("train", "tiny", *settings, "--exp", tmp_path / "exp", "--dry-run").split())
    (predicted,) = re.findall(r"peak memory of tensors, predicted ([\d.]+) GiB", printed)
    # Weights and moments, and the gradients of the second forward.
    assert 16 * 2_324_288 / 2**30 < float(predicted) < 0.2
    assert re.search(r"updates, epochs, hours of audio in all 1,000,000, [\d,.]+, [\d,]+", printed)
    assert "warning: trainer.updates=1000000 amounts to" in printed
    quiet = run("train", "tiny", *SMALL, f"data.train={corpus}", "--exp", tmp_path / "exp", "--dry-run")
    assert "warning" not in quiet


def test_two_encoders_cannot_be_predicted(
    run: Callable[..., str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An objective with a teacher (tests/helpers/semantics.py)."""
    monkeypatch.setitem(OBJECTIVES, "wav2vec2", WithTeacher)
    line = "ModelWithTeacher: has 2 encoders; memory and time can be predicted for models with one"
    assert error_of("plan", "base", *MICRO_RUN, "--gpus", 1, "--gpu-memory", 24) == line
    settings = [*MICRO_RUN, f"data.train={corpus}"]
    printed = run("train", "base", *settings, "--exp", tmp_path / "exp", "--dry-run")
    assert "updates, epochs, hours of audio in all" in printed and "predicted" not in printed
