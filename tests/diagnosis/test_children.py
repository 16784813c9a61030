"""A check whose library crashes, hangs, raises or prints ends alone, and its finding says why."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.doctor import stub
from tests.helpers.processes import ROOT
from w2vscale.diagnosis.child import Check, Children
from w2vscale.diagnosis.finding import Finding

CODES = {
    "raises": ("raise RuntimeError('built for another version')", "RuntimeError: built for another version"),
    "aborts": ("import os, sys\nprint('lib: broken', file=sys.stderr, flush=True)\nos.abort()",
               "crashes Python (SIGABRT): lib: broken"),
    "segfaults": ("import ctypes\nctypes.string_at(0)", "crashes Python (SIGSEGV)"),
    "exits": ("import os\nos._exit(7)", "ends Python with exit code 7"),
    "ignores signals": ("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)",
                        "does not end within 3 s"),
}  # fmt: skip


def run(check: Check, timeout: float = 60.0) -> tuple[list[Finding], bool]:
    with Children(timeout, at_a_time=1) as children:
        return children.start(check).result(timeout + 30)


@pytest.mark.parametrize("how", CODES)
def test_a_broken_library(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, expected = CODES[how]
    path = stub(tmp_path, jiwer=code)
    monkeypatch.setenv("PYTHONPATH", f"{path}{os.pathsep}{ROOT}")
    check = Check("jiwer", "software:package", "what to do", "warn", {"name": "jiwer"})
    (finding,), completed = run(check, timeout=3.0 if how == "ignores signals" else 60.0)
    assert not completed
    assert (finding.name, finding.verdict, finding.advice) == ("jiwer", "warn", "what to do")
    assert finding.found.startswith(expected)


def test_what_a_library_prints_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{stub(tmp_path, jiwer='print(0)')}{os.pathsep}{ROOT}")
    (finding,), completed = run(Check("jiwer", "software:package", "", "warn", {"name": "jiwer"}))
    assert completed and finding.verdict == "ok"


def test_children_end_with_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that runs is stopped, and the next one does not start."""
    marks = tmp_path / "marks"
    marks.mkdir()
    code = f"import os, time\nopen(os.path.join({str(marks)!r}, str(os.getpid())), 'w')\ntime.sleep(600)"
    monkeypatch.setenv("PYTHONPATH", f"{stub(tmp_path, jiwer=code)}{os.pathsep}{ROOT}")
    check = Check("jiwer", "software:package", "", "warn", {"name": "jiwer"})
    with Children(600, at_a_time=1) as children:
        first, second = children.start(check), children.start(check)
        deadline = time.monotonic() + 60
        while not list(marks.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert second.cancelled()
    (finding,), _ = first.result(30)
    assert finding.verdict == "warn"
    (mark,) = marks.iterdir()
    assert not Path(f"/proc/{mark.name}").exists()


def test_a_check_without_processes_left_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", refuse)
    (finding,), completed = run(Check("jiwer", "software:package", "", "fail", {"name": "jiwer"}))
    assert not completed
    assert finding.verdict == "fail" and "Resource temporarily unavailable" in finding.found


def test_the_command_itself_imports_nothing_that_can_be_broken() -> None:
    """Only its children do. (rich and typer, which print the report, are what every command needs.)"""
    script = "import sys, w2vscale.diagnosis.doctor; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    loaded = set(ast.literal_eval(done.stdout))
    assert "w2vscale" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "yaml", "lhotse", "soundfile", "deepspeed", "torchaudio"}
