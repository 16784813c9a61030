"""tools/bench/gpu.py: each phase loses its own rows only, and the report says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor

from tests.helpers.processes import running
from tests.helpers.tiers import long_except
from tools.bench import gpu
from tools.bench.engine_parity import ENGINES
from tools.bench.gpu import Phase, run_phases
from tools.bench.phases import engines
from tools.bench.phases.changes import CHANGES, COMPILED
from tools.bench.phases.measuring import Machine
from tools.bench.phases.operations import ATTENTION, FIRST_LAYER, POSITIONAL, STRIDED
from tools.bench.phases.report import choices, headline, main_figures
from w2vscale.errors import UserError
from w2vscale.models import wav2vec2

ROOT = Path(__file__).resolve().parents[2]
CPU = Machine("cpu", tiny=True)


def phase(name: str, seconds: float = 60.0) -> Phase:
    return Phase(name, f"tests.helpers.phases:{name}", seconds)


@pytest.mark.long
def test_a_phase_that_does_not_finish_loses_its_own_rows_only(tmp_path: Path) -> None:
    phases = [phase("fails"), phase("hangs", 10.0), phase("talks_for_ever", 3.0), phase("dies"), phase("good")]
    document = run_phases(phases, CPU, tmp_path, seconds=120.0)
    assert json.loads((tmp_path / "gpu.json").read_text())["phases"] == document["phases"]
    assert document["phases"]["good"] == {"device": "cpu", "tiny": True}
    assert document["phases"]["fails"] == document["phases"]["dies"] == {"first": 1.0}
    assert set(document["phases"]["talks_for_ever"]) == {"row 0", "row 1", "row 2"}
    assert not running(document["phases"]["hangs"]["child"])
    assert document["failed"] == {
        "fails": "RuntimeError: no such kernel",
        "hangs": "ran out of time after 10 s",
        "talks_for_ever": "ran out of time after 3 s",
        "dies": "its process ended with code -9, see dies.log",
    }
    log = (tmp_path / "fails.log").read_text()
    assert "about to fail" in log and "and a second line" in log


def test_a_phase_that_is_measured_again_leaves_the_others(tmp_path: Path) -> None:
    run_phases([phase("good"), phase("fails")], CPU, tmp_path, seconds=60.0)
    document = run_phases([phase("fails")], CPU, tmp_path, seconds=60.0, keep=True)
    assert set(document["phases"]) == {"good", "fails"} and document["phases"]["good"]["device"] == "cpu"
    assert set(run_phases([phase("good")], CPU, tmp_path, seconds=60.0)["phases"]) == {"good"}
    with pytest.raises(UserError, match="measured with other options"):
        run_phases([phase("good")], Machine("cpu", tiny=False), tmp_path, seconds=60.0, keep=True)
    for damaged in ("{", "[]", "{}", '{"device": "cpu", "tiny": true, "phases": 1}'):
        (tmp_path / "gpu.json").write_text(damaged)
        with pytest.raises(UserError, match=r"gpu\.json: damaged"):
            run_phases([phase("good")], CPU, tmp_path, seconds=60.0, keep=True)


def test_phases_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    document = run_phases([phase("hangs"), phase("good")], CPU, tmp_path, seconds=1.5)
    assert document["failed"] == {"hangs": "ran out of time after 1.5 s", "good": "no time was left"}


KEYS = {
    "environment": {
        "versions", "processor", "gpu", "attention_order", "attention_chosen", "copy_bytes_per_second", "matrix_flops",
        "base_matrix_flops", "large_matrix_flops",
    },
    "correctness": {f"{name}_{precision}" for name in ENGINES for precision in ("fp32", "bf16")}
    | {"max_relative_difference", "engines_agree"},
    "synchronisations": {f"{form}/{row}" for form in ("eager", "compiled") for row in ("places", "syncs_per_update")},
    **{
        f"rates_{name}": {
            "matrix_flops",
            *(
                f"{kind}/{forward}/{lengths}"
                for kind in ("eager", "compiled")
                for forward in ("1x0.5s", "2x0.5s")
                for lengths in ("equal", "bucket")
            ),
        }
        for name in ("base", "large")
    },
    **{
        f"transformers_{name}": {f"{one}/equal" for one in ("eager/2x0.5s", "compiled/2x0.5s")}
        for name in ("base", "large")
    },
    "operations": {
        *(f"{name}/attention/{form}" for name in ("base", "large") for form in ATTENTION),
        *(f"{name}/positional/{form}" for name in ("base", "large") for form in POSITIONAL),
        *(f"base/convolution {layer}/{form}" for layer in (1, 5) for form in STRIDED),
        *(f"base/convolution 0/{form}" for form in FIRST_LAYER),
    },
    "changes": {
        f"{name}/{change}/{form}" for name in ("base", "large") for change, forms in CHANGES.items() for form in forms
    },
    "new_shapes": {
        f"{kind}/{form}"
        for kind, forms in (("attention", ATTENTION), ("positional", POSITIONAL), ("second layer", STRIDED))
        for form in forms
    },
    "profile": {f"{name}/{forward}" for name in ("base", "large") for forward in ("1x0.5s", "2x0.5s")},
    "recompilations": {"graphs", "compiling_seconds", "median_ms"},
    "loader": {f"processes_{count}" for count in (1, 2, 4, 8)},
}  # fmt: skip

NOT_ON_A_CPU = {
    "cuDNN", "cuDNN, masked", "flash", "flash, in segments", "flash, packed", "memory-efficient",
    "memory-efficient, masked",
}  # fmt: skip
"""Forms of attention for which a CPU has no kernel."""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_phase_measures_on_a_cpu(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["failed"] == {}
    assert {name: set(rows) for name, rows in document["phases"].items()} == KEYS
    for name, rows in document["phases"].items():
        errors = {key for key, row in rows.items() if isinstance(row, dict) and "error" in row}
        assert {key.rpartition("/")[2] for key in errors} == (NOT_ON_A_CPU if errors else set()), (name, errors)
        assert not errors or name in ("operations", "new_shapes")
    last = json.loads(finished.stdout.splitlines()[-1])
    assert last == {key: document[key] for key in ("engines_agree", "syncs_per_update", "base", "large")}
    assert last["engines_agree"] is True
    for name in ("base", "large"):
        assert last[name]["audio_per_second"] > 0 and last[name]["mfu"] > 0 and last[name]["ratio"] > 0
        assert last[name]["ratio_of"] == "2x0.5s/equal"
    assert {"positional of base", "attention of large", "a new shape, attention"} <= set(document["choices"])


@pytest.mark.parametrize("part", long_except({"first layer"}, COMPILED))
def test_what_is_measured_compiled_can_be_compiled(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = CPU.config("base", "precision.compute=bf16")
    assert COMPILED[part](CPU, config, 2, 0.5, compiled=True) > 0
    torch._dynamo.reset()


def test_engines_agree_within_limits_that_compiled_code_does_not_have() -> None:
    def curve(loss: float) -> dict[str, list[float]]:
        losses, norms = [loss] * engines.UPDATES, [1.0] * engines.UPDATES
        saved = engines.SAVED
        return {
            "losses": losses, "norms": norms, "continued_losses": losses[saved:], "continued_norms": norms[saved:]
        }  # fmt: skip

    curves = {("ddp", "fp32"): curve(1.0), ("fsdp", "fp32"): curve(1.0 + 1e-6), ("ddp_compiled", "fp32"): curve(1.5)}
    differences, agree = engines.compare(curves, {}, tiny=True)
    assert agree
    assert differences["fp32_losses"] == pytest.approx(1e-6, rel=1e-3)
    assert differences["fp32_compiled_losses"] == pytest.approx(0.5)
    assert not engines.compare(curves | {("zero1", "fp32"): curve(1.1)}, {}, tiny=True)[1]
    assert not engines.compare(curves | {("ddp", "cpu"): curve(1.1)}, {}, tiny=True)[1]
    assert not engines.compare(curves, {"fp32": 1.0}, tiny=True)[1]


def rate(audio_per_second: float, **others: float) -> dict[str, float]:
    measured = {"mfu": 0.3, "flops_per_second": 2e14, "window_ms": 100.0, "host_ms": 40.0, "forward_seconds": 624.0}
    return {"audio_per_second": audio_per_second, **measured, **others}


def document_of(**phases: dict[str, Any]) -> dict[str, Any]:
    return {"phases": phases, "failed": {}, "device": "cuda", "started": "today"}


def test_the_ratio_is_of_the_same_work() -> None:
    document = document_of(
        rates_base={
            "matrix_flops": 8e14,
            "eager/5x15.6s/equal": rate(2000.0, audio_per_second_stepping=1800.0),
            "compiled/5x15.6s/equal": rate(1900.0, audio_per_second_stepping=1700.0),
            "compiled/40x15.6s/equal": rate(6000.0, audio_per_second_stepping=6000.0),
            "compiled/40x15.6s/bucket": {"error": "out of memory"},
        },
        transformers_base={
            "eager/20x15.6s/equal": {"audio_per_second": 300.0},
            "compiled/5x15.6s/equal": {"audio_per_second": 1200.0},
        },
        transformers_large={"eager/12x20s/equal": {"audio_per_second": 99999.0}},
        correctness={"engines_agree": True},
        synchronisations={"eager/syncs_per_update": 2, "compiled/syncs_per_update": 1},
    )
    found = headline(document)
    assert found["base"]["best"] == "compiled/40x15.6s/equal"
    assert found["base"]["ratio"] == pytest.approx(1.5) and found["base"]["ratio_of"] == "5x15.6s/equal"
    assert found["base"]["ratio_of_bests"] == pytest.approx(5.0)
    assert found["base"]["mfu"] == pytest.approx(0.3) and found["base"]["mfu_of_measured"] == pytest.approx(0.25)
    assert found["large"]["mfu"] is None and found["large"]["ratio"] is None
    assert found["engines_agree"] is True and found["syncs_per_update"] == 1


def test_choices_rank_the_forms_and_weigh_padding() -> None:
    document = document_of(
        operations={
            "base/positional/conv1d": 20.0,
            "base/positional/in blocks": 2.5,
            "base/positional/other": {"error": "no such kernel"},
        },
        changes={"base/weights to bf16/together": 0.2, "base/weights to bf16/each (before)": 0.5},
        new_shapes={
            "attention/cuDNN": {"shapes": 40, "first_ms": 1, "first_ms_worst": 1, "second_ms": 1, "extra_seconds": 5.4},
            "attention/flash": {"shapes": 40, "first_ms": 1, "first_ms_worst": 1, "second_ms": 1, "extra_seconds": 0.0},
        },
        rates_base={
            "eager/5x15.6s/equal": rate(2000.0, window_ms=80.0, forward_seconds=78.0),
            "eager/40x15.6s/equal": rate(4000.0),
            "eager/40x15.6s/bucket": rate(3600.0),
        },
    )
    found = choices(document)
    assert found["positional of base"] == "in blocks 2.50 ms, conv1d 20.00 ms"
    assert found["a new shape, attention"] == "flash 0.0 ms, cuDNN 135.0 ms"
    assert found["weights to bf16 of base"] == "together 0.20 ms, each (before) 0.50 ms"
    assert found["padding of base, eager"] == "costs 10.0% of the rate at eager/40x15.6s/equal"
    figures = {figure: value for _, figure, value in main_figures(document)}
    assert figures["base/positional/other"] == "no such kernel"
    assert figures["eager/40x15.6s/equal"] == "4,000 s/s, MFU 30.0%, window 100 ms, host 40 ms"


def test_what_the_command_line_gets_wrong_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="speed: not one of environment, correctness"):
        gpu.main(out=tmp_path, device="cpu", only=["speed"])
    with pytest.raises(typer.BadParameter, match="tpu: not one of cuda, cpu"):
        gpu.main(out=tmp_path, device="tpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written: File exists"):
        gpu.main(out=tmp_path / "file", device="cpu", tiny=True, only=["loader"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: this machine has no GPU"):
            gpu.main(out=tmp_path, device="cuda")


@pytest.mark.parametrize("broken", [False, True])
def test_a_wrong_operation_in_bf16_shows_in_the_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """The loss hardly tells."""
    right = wav2vec2.positional_convolution

    def convolve(x_BTD: Tensor, *others: Any) -> Tensor:
        return torch.zeros_like(x_BTD) if x_BTD.dtype == torch.bfloat16 and broken else right(x_BTD, *others)

    monkeypatch.setattr(wav2vec2, "positional_convolution", convolve)
    for precision in engines.PRECISIONS:
        config = CPU.config("base", *engines.QUIET, f"precision.compute={precision}")
        setup = engines._build(config, CPU.device)
        batches = [engines._padded_batch(config, number, tiny=True) for number in range(2)]
        file = tmp_path / f"gradients-{precision}-cpu.safetensors"
        engines._updates(setup, batches, range(1), file)
    differences = engines.gradient_differences(tmp_path, CPU)
    assert differences["fp32"] == 0.0
    assert (differences["bf16"] > engines.AGREE_GRADIENTS_TINY["bf16"]) is broken
