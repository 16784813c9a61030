"""The benches' own arithmetic, and that they start."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_MODEL
from tools.bench import (
    convert,
    end_to_end,
    engine_overhead,
    engine_parity,
    gradient_reduction,
    loader,
    loss_head,
    plan_memory,
    sampler,
    step,
    step_profile,
    stream,
    vad,
)
from tools.bench.allocations import Allocations, storages
from tools.bench.contenders import Work, torchaudio_step, work_settings
from tools.bench.engine_parity import relative_difference
from tools.bench.script import run_script
from tools.bench.sent_bytes import Collective, sent_by_kind
from w2vscale.config import dump_config, load_config
from w2vscale.errors import UserError
from w2vscale.planning.live_memory import LiveMemory


@pytest.mark.parametrize(
    ("main", "option"),
    [
        (engine_overhead.main, "--updates"),
        (engine_parity.main, "--updates"),
        (plan_memory.main, "--engine"),
        (gradient_reduction.main, "--compute"),
        (vad.vad, "--minutes"),
        (convert.main, "--preset"),
    ],
)
def test_help(main: Callable[..., None], option: str) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--help"], env={"TERM": "dumb", "COLUMNS": "120"})
    assert result.exit_code == 0
    assert option in result.stdout


@pytest.mark.long
@pytest.mark.timeout(600)
def test_conversions_of_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert.main(preset="tiny", folder=tmp_path / "bench")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["identical"] and found["bytes"] > 9_000_000
    assert len(found["steps"]) == 5
    assert all(step["seconds"] > 0 and step["peak_anonymous_mb"] > 100 for step in found["steps"])
    assert not [*tmp_path.iterdir()]


def test_views_of_one_storage_count_once() -> None:
    whole = torch.zeros(10)
    assert sum(storages([whole, whole[2:], None, torch.zeros(3), torch.empty(5, device="meta")]).values()) == 52


def test_peaks_of_allocations() -> None:
    with Allocations(torch.device("cpu")) as allocations:
        with allocations.phase("one"):
            kept = torch.zeros(1000, 1000)
            del (temporary := [torch.zeros(500, 1000)])[0]
        with allocations.phase("two"):
            product = kept @ kept
            del kept
    assert not temporary and product.shape == (1000, 1000)
    assert allocations.peaks == {"one": 6_000_000, "two": 8_000_000}


def test_bytes_that_a_ring_sends() -> None:
    found = [
        Collective("allreduce_", 4000, 4), Collective("_reduce_scatter_base_", 4000, 4), Collective("reduce_", 4000, 2),
        Collective("_allgather_base_", 800, 2), Collective("broadcast_", 800, 1), Collective("allreduce_", 4, 4),
        Collective("barrier", 4000, 4),
    ]  # fmt: skip
    assert sent_by_kind(found) == {"gradients": 6000 + 3000 + 2000, "parameters": 400}


def test_curves_of_two_settings_and_two_seeds() -> None:
    curves = {
        (reduce, seed): gradient_reduction.Curve([level] * 60, {"loss": level})
        for (reduce, seed), level in {
            ("fp32", 0): 1.0, ("bf16", 0): 1.0, ("fp32", 1): 3.0, ("bf16", 1): 5.0,
        }.items()
    }  # fmt: skip
    found = gradient_reduction.compare(curves)
    assert found["between_settings"]["end"] == pytest.approx((0 + 0.5) / 2)
    assert found["between_seeds"]["validation_loss"] == pytest.approx((1.0 + 4 / 3) / 2)


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_peaks_of_all_engines_are_predicted_within_a_tenth() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    app = typer.Typer()
    app.command()(plan_memory.main)
    result = CliRunner().invoke(app, ["--preset", "tiny", "--seconds", "4", "--processes", "2"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert [row["engine"] for row in figures["rows"]] == ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    assert figures["max_relative_error"] < 0.1, result.stdout
    for row in figures["rows"]:
        # Nothing of it comes from the prediction: weights, moments and gradients, counted tensor by tensor.
        held = sum(row["held"][kind] for kind in ("parameters", "masters", "gradients", "moments"))
        # ZeRO-3 never shards small parameters.
        assert held == pytest.approx(sum(row["predicted_held"].values()), rel=0.1)
        assert row["peak"] > held


def test_relative_difference() -> None:
    assert relative_difference([1.0, 2.2, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(0.25)


@pytest.mark.long
def test_the_step_bench_trains_all_on_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="Transformers is not installed")
    monkeypatch.setattr(step, "matrix_rate", lambda compute, device: 1e9)
    app = typer.Typer()
    app.command()(step.main)
    quiet = (
        "regularization.dropout=0",
        "regularization.attention_dropout=0",
        "regularization.input_dropout=0",
        "objective.feature_dropout=0",
    )
    options = ["--compute", "fp32", "--utterances", "6", "--seconds", "4", "--lengths", "--rounds", "1"]
    result = CliRunner().invoke(app, [*options, *MICRO_MODEL, *quiet, "objective.feature_penalty_weight=0"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    (row,) = figures["rows"]
    ours, theirs = row["steps"]["w2vscale"], row["steps"]["transformers"]
    # What is left to chance is the quantizer's noise.
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=0.04)
    assert 16.0 < row["audio_seconds"] < 24.0 and ours["memory"] > 2**27
    # Forward and backward of a linear layer cost about three times its forward.
    assert row["flops"] > 3 * 2 * 3 * 32 * 64 * 800
    assert figures["fp32"]["ratio"] == row["ratio"] > 0 and figures["fp32"]["mfu"] == ours["mfu"] > 0
    assert figures["audio_seconds_per_second"] == ours["audio_per_second"] > 0
    assert 0 < figures["loss_head_memory_ratio"] < 1
    wrong = CliRunner().invoke(app, ["--with", "fairseq"])
    assert wrong.exit_code == 2 and "fairseq: none of w2vscale" in wrong.output


@pytest.mark.usefixtures("torchaudio")
def test_torchaudios_encoder_takes_steps() -> None:
    work = Work(load_config("base", [*MICRO_MODEL, "precision.compute=fp32"]), utterances=2, seconds=1.0)
    step = torchaudio_step(work.config, torch.device("cpu"))
    losses = [step(work.batch()) for _ in range(3)]
    assert min(losses) > 0 and len(set(losses)) > 1  # the first steps may change the loss by less than a rounding


def test_the_profile_gives_the_backwards_time_to_the_module_whose_forward_made_it(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(step_profile.main)
    options = ["--utterances", "2", "--seconds", "2", "--folder", str(tmp_path), *MICRO_MODEL]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    modules = json.loads(result.stdout.splitlines()[-1])["modules"]
    expected = {f"feature encoder, layer {layer}" for layer in range(7)}
    expected |= {"blocks: attention", "blocks: feed-forward", "positional convolution", "quantizer"}
    for name in expected | {step_profile.LOSS}:
        assert modules[name]["forward"] > 0 and modules[name]["backward"] > 0, name
    assert modules[step_profile.OPTIMIZER]["backward"] == 0
    # Far more is computed in seven convolutions of 16 channels than in linear layers on masked frames.
    assert (
        sum(modules[f"feature encoder, layer {layer}"]["backward"] for layer in range(7))
        > (modules["projections of the loss"]["backward"])
    )
    assert (tmp_path / "step.png").stat().st_size > 10_000 and (tmp_path / "trace.json.gz").is_file()


def test_live_memory_counts_what_is_there_at_once() -> None:
    kept = torch.ones(100)
    with LiveMemory() as memory:
        first = kept + 1  # 400 bytes
        view = first[10:]
        assert memory.live == 400
        del first
        assert memory.live == 400
        del view
        assert memory.live == 0
        kept.mul_(2)
        torch.ones(10)
    assert memory.peak == 400


@pytest.fixture
def few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "UPDATES", 32)


@pytest.mark.long
@pytest.mark.usefixtures("few_updates")
def test_the_sampler_bench_compares_both_on_the_same_durations() -> None:
    result = CliRunner().invoke(sampler.app, ["--utterances", "1500", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert 0 < figures["padding"] < figures["padding_lhotse"] < 0.1
    assert figures["partly_filled"] < 0.05
    for key in ("plan_seconds", "plan_seconds_lhotse", "restore_seconds", "restore_seconds_lhotse"):
        assert figures[key] > 0
    assert {"memory_mb", "memory_mb_lhotse", "ratio", "ratio_walked", "walk_seconds", *sampler.FORMS} <= set(figures)


@pytest.mark.long
@pytest.mark.usefixtures("few_updates")
def test_the_sampler_bench_opens_a_corpus_on_disk(tmp_path: Path) -> None:
    options = ["--utterances", "1000", "--rounds", "1", "--no-lhotse", "--folder", str(tmp_path)]
    result = CliRunner().invoke(sampler.app, options)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["utterances"] == 1000 and figures["restore_seconds"] > 0
    assert "padding_lhotse" not in figures


@pytest.mark.usefixtures("few_updates")
def test_default_forwards_are_long_and_have_little_padding() -> None:
    forms = sampler.measure_forwards(sampler.durations(100_000))
    for preset, budget in (("base", 87.5), ("large", 75.0)):
        for ranks in ("1", "8", "32"):
            series, alone, joined = (forms[form][preset][ranks] for form in sampler.FORMS)
            assert alone["micro_batches"] == 1 and 0.7 * budget < alone["seconds_mean"] <= budget
            assert series["micro_batches"] == joined["micro_batches"] >= 2
            assert series["seconds_mean"] == pytest.approx(series["micro_batches"] * alone["seconds_mean"], rel=0.05)
            assert series["seconds_shortest"] <= series["seconds_p10"] <= series["seconds_mean"]
            assert series["padding"] < 0.015 < joined["padding"]
            if ranks != "32":  # where a rank has 64 / 32 or 128 / 32 micro-batches per update
                assert series["seconds_shortest"] > 300


def test_the_loader_bench_counts_audio_and_bytes(small_corpus: SmallCorpus) -> None:
    rate, copied = loader.load(small_corpus.train, 1, 20, ["batch.max_seconds=16"])
    assert rate > 0
    # Samples of four bytes and their padding, negatives, masks.
    assert 64_000 < copied < 200_000
    files = [str(path) for path in small_corpus.train.parent.rglob("*.flac")]
    assert loader.decode_in_processes(files, 0) > 0
    assert loader.decode_in_processes(files, 2) > 0


def test_the_stream_bench_loads_and_decodes_shards(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    folder = stream.write_shards(small_corpus.train, tmp_path)
    settings = [f"data.train={folder}", "data.mode=stream", "batch.micro_batches=2", "data.min_seconds=1"]
    found = stream.load(settings, 0, 2)
    assert found["rate"] > 0 and found["first"] > 0 and 0 <= found["padding"] < 0.5
    assert stream.decode_in_processes(folder, 0) > 0
    assert stream.decode_in_processes(folder, 2) > 0


@pytest.mark.long
def test_the_end_to_end_bench_compares_a_run_with_its_steps(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(end_to_end.main)
    options = ["--updates", "6", "--every", "2", "--rounds", "1", "--folder", str(tmp_path / "bench")]
    settings = [*MICRO_MODEL, "data.max_seconds=2", "batch.max_seconds=8", "logging.tensorboard=false"]
    result = CliRunner().invoke(app, [str(small_corpus.train), *options, *settings])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert 0 < figures["ratio"] < 2 and 0 <= figures["waited"][0] < 1
    assert (tmp_path / "bench" / "run0" / "checkpoints" / "update_00000006").is_dir()


@pytest.mark.long
def test_a_contender_that_fails_leaves_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    work = Work(load_config("base", [*MICRO_MODEL, "precision.compute=fp32"]), 1, 1.0)
    row = step.measure(work, ["w2vscale", "nobody"], device=torch.device("cpu"), rounds=1, limit=60.0)
    step.print_table(row | {"preset": "micro", "compute": "fp32", "utterances": 1, "seconds": 1.0})
    assert row["steps"]["nobody"] is None and row["steps"]["w2vscale"]["median"] > 0 and row["ratio"] is None
    assert "nobody: its process has ended" in capfd.readouterr().out


def test_operations_are_counted_as_the_model_is_defined() -> None:
    config = load_config("base")
    work, model = Work(config, utterances=1, seconds=5.0), config.model
    steps, inputs, total = 80_000, 1, 0
    for number, (channels, kernel, stride) in enumerate(model.conv_layers):
        steps = (steps - kernel) // stride + 1
        ways = 2 if number == 0 else 3  # forward, gradient of the weights; the waveform has none
        total += ways * 2 * steps * kernel * inputs * channels
        inputs = channels
    linear = 4 * model.dim**2 + 2 * model.dim * model.ffn_dim
    attention = 2 * steps * model.dim
    positional = model.dim // model.positional_groups * model.dim * model.positional_kernel
    total += 6 * steps * (model.layers * (linear + attention) + positional + inputs * model.dim)
    assert work.flops() == pytest.approx(total, rel=0.01)


def test_a_step_here_is_of_pretraining_alone() -> None:
    for preset, settings, said in (
        ("ctc_1h", (), "objective.name=ctc; a step here is of pretraining"),
        ("base", ("engine.name=fsdp",), "one process"),
    ):
        with pytest.raises(UserError, match=said):
            work_settings(preset, settings)


def test_what_is_wrong_outside_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["loss_head.py", "--preset", "nobody"])
    with pytest.raises(SystemExit, match="2"):
        run_script(loss_head.main)
    assert capsys.readouterr().err.startswith("error: nobody: ")


def test_the_conversion_bench_writes_a_random_model_and_compares_every_bit(tmp_path: Path) -> None:
    settings = tmp_path / "small.yaml"
    settings.write_text(dump_config(load_config("base", MICRO_MODEL)))
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    size = convert.write_random_model(str(settings), one)
    assert convert.write_random_model(str(settings), other) == size
    state = torch.load(one, weights_only=True)["model"]
    assert size == sum(tensor.nbytes for tensor in state.values()) and convert.bytes_below(tmp_path) > 2 * size
    assert not any(torch.equal(state["final_proj.bias"], tensor) for tensor in (torch.zeros(16), torch.ones(16)))
    assert convert.same_tensors(one, other)
    state["final_proj.bias"][0] = torch.nextafter(state["final_proj.bias"][0], torch.tensor(1.0))
    torch.save({"model": state}, other)
    assert not convert.same_tensors(one, other)
    del state["final_proj.bias"]
    torch.save({"model": state}, other)
    assert not convert.same_tensors(one, other)


def test_the_conversion_bench_samples_the_memory_of_a_process(tmp_path: Path) -> None:
    script = "import time; held = bytearray(200_000_000); held[::4096] = held[::4096]; time.sleep(1)"
    step = convert.measure("a step", [sys.executable, "-c", script], 10**6)
    assert step.name == "a step" and step.seconds > 1 and 200 < step.peak_anonymous_mb < 300
    with pytest.raises(UserError, match="ended with 3"):
        convert.measure("a step", [sys.executable, "-c", "raise SystemExit(3)"], 0)
    with pytest.raises(UserError, match="ended with 0 before it was killed"):
        convert.kill_half_way([sys.executable, "-c", ""], tmp_path, tmp_path / "out", 10**6)
