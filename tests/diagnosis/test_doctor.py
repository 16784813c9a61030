"""`w2vscale doctor` as a user runs it: right verdicts on this machine, and on ones that are broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers.doctor import Report, doctor, environment_without, missing_for_mounts, stub
from tests.helpers.processes import ROOT, running
from w2vscale.cli.app import app

SMALL_SHM = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
FEW_FILES = 'ulimit -n 100 && exec "$@"'

STUBS = {
    "torchaudio": 'raise OSError("libcudart.so.13: cannot open shared object file: No such file or directory")\n',
    "jiwer": "import os\nos.abort()\n",
    "sentencepiece": "import sys\nprint('loading')\nsys.exit(3)\n",
}


def check_end(report: Report) -> None:
    """The last line counts the verdicts, and the exit code follows from them."""
    verdicts = [row.verdict for row in report.rows.values()]
    expected = []
    for verdict, noun in (("warn", "warning"), ("fail", "failure")):
        if count := verdicts.count(verdict):
            expected.append(f"{count} {noun}{'s' if count > 1 else ''}")
    assert report.last == (", ".join(expected) or "no problems found")
    assert report.code == int("fail" in verdicts), report
    for name, row in report.rows.items():
        assert row.verdict == "ok" or "→" in row.text, f"{name}: no advice"


def test_a_machine_with_much_that_is_broken(tmp_path: Path) -> None:
    """Without DeepSpeed, with a broken torchaudio, libraries that crash, a low limit of files and a tiny /dev/shm.

    None of this ends the report or hides the rest.
    """
    python = environment_without(tmp_path / "env", "deepspeed", "s3fs", "datasets", "silero_vad")
    stubs = stub(tmp_path / "stubs", **STUBS)
    unshared = missing_for_mounts() is None
    before = ["unshare", "--mount", "sh", "-c", SMALL_SHM, "sh"] if unshared else []
    report = doctor(
        "--exp", tmp_path / "exp" / "new",
        python=python, path=[stubs], before=[*before, "sh", "-c", FEW_FILES, "sh"],
        environment={"OMP_NUM_THREADS": "many"},
    )  # fmt: skip
    rows = report.rows
    assert rows["DeepSpeed"].verdict == "warn"
    assert "not installed" in rows["DeepSpeed"].text and "pip install 'w2vscale[deepspeed]'" in rows["DeepSpeed"].text
    assert rows["torchaudio"].verdict == "warn"
    assert "OSError: libcudart.so.13" in rows["torchaudio"].text
    assert "pip uninstall torchaudio" in rows["torchaudio"].text
    assert rows["transformers"].verdict == "warn" and "OSError: libcudart.so.13" in rows["transformers"].text
    assert rows["jiwer"].verdict == "warn" and "crashes Python (SIGABRT)" in rows["jiwer"].text
    assert rows["sentencepiece"].verdict == "warn" and "exit code 3: loading" in rows["sentencepiece"].text
    assert rows["s3fs"].verdict == "ok" and "not installed" in rows["s3fs"].text
    assert rows["open files"].verdict == "fail" and rows["open files"].text.startswith("100 ")
    assert rows["threads"].verdict == "warn" and "OMP_NUM_THREADS=many" in rows["threads"].text
    if unshared:
        assert rows["/dev/shm"].verdict == "fail" and "--shm-size" in rows["/dev/shm"].text
    else:
        assert rows["/dev/shm"].verdict in ("ok", "warn")
    # What works is still found to work.
    assert rows["PyTorch"] == ("ok", torch.__version__)
    working = ["Python", "required packages", "lhotse", "safetensors", "tensorboard"]
    for name in (*working, "WAV", "FLAC", "Ogg Vorbis", "Opus", "MP3"):
        assert rows[name].verdict == "ok", name
    assert {"memory", "CPU cores", "disk space", "network"} <= rows.keys()
    assert report.code == 1
    check_end(report)
    assert not (tmp_path / "exp").exists()


@pytest.mark.skipif(missing_for_mounts() is not None, reason=str(missing_for_mounts()))
def test_a_tiny_shared_memory_is_the_only_failure_of_its_row() -> None:
    """The check alone, in this environment: 1 MB fails, and 4 GB do not."""
    for size, verdict in (("1m", '"fail"'), ("4g", '"ok"')):
        mounted = SMALL_SHM.replace("1m", size)
        child = [sys.executable, "-m", "w2vscale.diagnosis.child", "machine:machine", '{"ranks": 1, "world_size": 1}']
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", mounted, "sh", *child],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        (line,) = [line for line in done.stdout.splitlines() if '"/dev/shm"' in line]
        assert f'"verdict": {verdict}' in line


@pytest.mark.long
def test_this_machine(tmp_path: Path) -> None:
    """An environment of tools/setup.sh has everything; what depends on the machine is not asserted."""
    report = doctor("--exp", tmp_path)
    rows = report.rows
    if not torch.cuda.is_available():
        if not list(Path("/dev").glob("nvidia*")):
            assert rows["GPU"].verdict == "warn" and "none found" in rows["GPU"].text
        assert rows["NCCL"].verdict == "ok"
    names = ["Python", "w2vscale", "required packages", "PyTorch", "safetensors", "DeepSpeed", "lhotse"]
    names += ["DeepSpeed operators", "WAV", "FLAC", "Ogg Vorbis", "Opus", "MP3", "av", "tensorboard", "transformers"]
    for name in names:
        assert rows[name].verdict == "ok", rows[name]
    assert str(tmp_path) in rows["disk space"].text
    assert "not checked" in rows["network"].text
    assert not list(tmp_path.iterdir())
    check_end(report)


@pytest.mark.long
def test_a_pytorch_that_crashes_is_one_failure_with_its_cause(tmp_path: Path) -> None:
    report = doctor("--exp", tmp_path, path=[stub(tmp_path / "stubs", torch="import os\nos.abort()\n")])
    assert report.rows["PyTorch"].verdict == "fail" and "crashes Python (SIGABRT)" in report.rows["PyTorch"].text
    for name in ("GPU", "DeepSpeed", "lhotse", "silero-vad"):
        assert report.rows[name].verdict == "fail" and "because PyTorch does not work" in report.rows[name].text
    assert report.rows["jiwer"].verdict == "ok"
    assert report.rows["disk writing"].verdict in ("ok", "warn", "fail")
    check_end(report)


@pytest.mark.long
def test_ctrl_c_ends_the_command_and_its_children(tmp_path: Path) -> None:
    stubs = stub(tmp_path / "stubs", torchaudio="import time\ntime.sleep(600)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "w2vscale", "doctor", "--exp", tmp_path],
        env=os.environ | {"PYTHONPATH": f"{stubs}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        assert command.stdout is not None and command.stderr is not None
        while not command.stdout.readline().startswith("ok    MP3"):
            assert command.poll() is None
        tasks = Path(f"/proc/{command.pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        assert children
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
        assert "Traceback" not in command.stderr.read()
    assert not any(map(running, children))


def test_ctrl_c_deletes_the_files_of_the_measurement(tmp_path: Path) -> None:
    """SIGTERM to the child that measures, as the command sends it after Ctrl-C, while small files are there."""
    child = subprocess.Popen(
        [sys.executable, "-c", HELD, "disk:disk", f'{{"folder": "{tmp_path}"}}'],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".w2vscale-doctor-*/*")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


HELD = """
import time
from w2vscale.diagnosis import child, disk

disk.speed = lambda place: (1.0, 1.0)
disk._forget = lambda descriptor: time.sleep(60)
child.__package__ = "w2vscale.diagnosis"
child.main()
"""
"""Measures the disk, but waits once the first small file is written."""


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e308", "-1", "0", "86401", "1s"])
def test_a_timeout_that_is_none_is_refused(seconds: str) -> None:
    done = CliRunner().invoke(app, ["doctor", "--timeout", seconds])
    assert done.exit_code == 2 and "--timeout" in done.output
