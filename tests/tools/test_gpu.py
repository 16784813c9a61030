"""tools/bench/gpu.py: each phase loses its own rows only, and the report says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.bench import gpu
from tools.bench.gpu import PHASES, Phase, run_phases
from tools.bench.phases.measuring import Machine
from tools.bench.phases.report import choices, headline, main_figures

ROOT = Path(__file__).resolve().parents[2]
CPU = Machine("cpu", tiny=True)


def phase(name: str, seconds: float = 60.0) -> Phase:
    return Phase(name, f"tests.tools.phases:{name}", seconds)


def is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_phase_that_does_not_finish_loses_its_own_rows_only(tmp_path: Path) -> None:
    phases = [phase("fails"), phase("hangs", 2.0), phase("talks_for_ever", 1.0), phase("dies"), phase("good")]
    document = run_phases(phases, CPU, tmp_path, seconds=120.0)
    assert json.loads((tmp_path / "gpu.json").read_text())["phases"] == document["phases"]
    assert document["phases"]["good"] == {"device": "cpu", "tiny": True}
    assert document["phases"]["fails"] == document["phases"]["dies"] == {"first": 1.0}
    assert set(document["phases"]["talks_for_ever"]) == {"row 0", "row 1", "row 2"}
    assert not is_running(document["phases"]["hangs"]["child"])
    assert document["failed"] == {
        "fails": "RuntimeError: no such kernel",
        "hangs": "ran out of time after 2 s",
        "talks_for_ever": "ran out of time after 1 s",
        "dies": "its process ended with code -9, see dies.log",
    }
    log = (tmp_path / "fails.log").read_text()
    assert "about to fail" in log and "and a second line" in log


def test_phases_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    document = run_phases([phase("hangs"), phase("good")], CPU, tmp_path, seconds=1.5)
    assert document["failed"] == {"hangs": "ran out of time after 1.5 s", "good": "no time was left"}


def test_every_phase_measures_on_a_cpu(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["failed"] == {} and set(document["phases"]) == {each.name for each in PHASES}
    assert all(document["phases"].values())
    last = json.loads(finished.stdout.splitlines()[-1])
    assert last == {key: document[key] for key in ("engines_agree", "syncs_per_update", "base", "large")}
    assert last["engines_agree"] is True
    for name in ("base", "large"):
        assert last[name]["audio_per_second"] > 0 and last[name]["mfu"] > 0 and last[name]["ratio"] > 0
    assert {"positional of base", "attention of large", "a new shape, attention"} <= set(document["choices"])


def rate(audio_per_second: float, **others: float) -> dict[str, float]:
    measured = {"mfu": 0.3, "flops_per_second": 2e14, "window_ms": 100.0, "host_ms": 40.0, "forward_seconds": 624.0}
    return {"audio_per_second": audio_per_second, **measured, **others}


def document_of(**phases: dict[str, Any]) -> dict[str, Any]:
    return {"phases": phases, "failed": {}, "device": "cuda", "started": "today"}


def test_the_headline_takes_the_best_of_both_sides() -> None:
    document = document_of(
        rates_base={
            "matrix_flops": 8e14,
            "eager/40x15.6s/equal": rate(4000.0),
            "compiled/40x15.6s/equal": rate(6000.0),
            "compiled/40x15.6s/bucket": {"error": "out of memory"},
        },
        transformers_base={
            "eager/20x15.6s/equal": {"audio_per_second": 300.0},
            "compiled/5x15.6s/equal": {"audio_per_second": 1200.0},
        },
        transformers_large={"eager/12x20s/equal": {"audio_per_second": 99999.0}},
        correctness={"engines_agree": True},
        synchronisations={"syncs_per_update": 1},
    )
    found = headline(document)
    assert found["base"]["best"] == "compiled/40x15.6s/equal"
    assert found["base"]["ratio"] == pytest.approx(5.0)
    assert found["base"]["mfu"] == pytest.approx(0.3) and found["base"]["mfu_of_measured"] == pytest.approx(0.25)
    assert found["large"]["mfu"] is None and found["large"]["ratio"] is None
    assert found["engines_agree"] is True and found["syncs_per_update"] == 1


def test_choices_rank_the_forms_and_weigh_casts_and_padding() -> None:
    document = document_of(
        operations={
            "base/positional/conv1d": 20.0,
            "base/positional/in blocks": 2.5,
            "base/positional/other": {"error": "no such kernel"},
            "base/weights to bf16": 0.5,
        },
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
    assert found["weights of base cast in each forward"] == "0.50 ms, 5.0% of a short forward"
    assert found["padding of base, eager"] == "costs 10.0% of the rate at eager/40x15.6s/equal"
    figures = {figure: value for _, figure, value in main_figures(document)}
    assert figures["base/positional/other"] == "no such kernel"
    assert figures["eager/40x15.6s/equal"] == "4,000 s/s, MFU 30.0%, window 100 ms, host 40 ms"


def test_an_unknown_phase_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(gpu.typer.BadParameter, match="speed: not one of environment, correctness"):
        gpu.main(out=tmp_path, only=["speed"])
