"""`w2vscale doctor` in environments that lack something, and what it prints."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.helpers.processes import FORKS, ROOT
from w2vscale.diagnosis.finding import Finding
from w2vscale.errors import UserError

ROW = re.compile(r"(ok|warn|fail) +(.{20})  (.*)")
BOUND = 120.0
"""Seconds in which the command has to end, also on a busy machine."""


class Row(NamedTuple):
    """A row of the report; `text` is what was found and, in other lines, the advice."""

    verdict: str
    text: str


class Report(NamedTuple):
    """What the command printed."""

    code: int
    rows: dict[str, Row]
    last: str
    errors: str


@dataclass(frozen=True)
class Outcome:
    """What a rank found, or the error that it raised."""

    findings: list[Finding]
    error: str

    def __getitem__(self, name: str) -> Finding:
        """The only finding of this name."""
        (found,) = [finding for finding in self.findings if finding.name == name]
        return found


def environment_without(folder: Path, *packages: str) -> Path:
    """Make a virtual environment that has all packages of this one but some; returns its Python.

    Nothing is copied or installed: its packages are links to those of this environment.
    """
    here = Path(sysconfig.get_path("purelib"))
    there = folder / here.relative_to(sys.prefix)
    there.mkdir(parents=True)
    for package in here.iterdir():
        name = re.split(r"[-.]", package.name.lower())[0]
        if name not in packages:
            (there / package.name).symlink_to(package)
    (folder / "pyvenv.cfg").write_text(
        f"home = {Path(sys.base_prefix) / 'bin'}\ninclude-system-site-packages = false\n"
    )
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    return python


def stub(folder: Path, **modules: str) -> Path:
    """Make packages whose import runs some code; returns the folder, for PYTHONPATH."""
    for name, code in modules.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(code)
    return folder


@cache
def missing_for_mounts() -> str | None:
    """Why this process may not mount a small /dev/shm for its children, or None."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True, text=True, check=False
    )
    return tried.stderr.strip() or "mounting fails" if tried.returncode else None


def doctor(
    *arguments: object,
    python: Path | None = None,
    path: Sequence[Path] = (),
    before: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Report:
    """Run the command, with some folders before the others in the path of modules. `before`: a command that runs it."""
    done = subprocess.run(
        [*before, str(python or sys.executable), "-m", "w2vscale", "doctor", *map(str, arguments)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "COLUMNS": "200"}
        | dict(environment or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    return parsed(done.returncode, done.stdout, done.stderr)


def parsed(code: int, printed: str, errors: str = "") -> Report:
    """The rows of a report. The continued lines of a row begin with spaces."""
    rows: dict[str, Row] = {}
    name = ""
    for line in printed.splitlines():
        if found := ROW.fullmatch(line):
            name = found[2].strip()
            rows[name] = Row(found[1], found[3].strip())
        elif line.startswith(" ") and name:
            row = rows[name]
            rows[name] = row._replace(text=f"{row.text}\n{line[26:].strip()}")
    lines = printed.splitlines() or [""]
    return Report(code, rows, lines[-1], errors)


@dataclass(frozen=True)
class Rank:
    """A rank of a test: what its process is told, and what it finds on its machine."""

    number: int
    world_size: int
    host: str = "node1"
    local_rank: int = 0
    exp: Path | None = None
    local: tuple[Finding, ...] = ()
    local_seconds: float = 0.5
    versions: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def examined(folder: Path, ranks: Sequence[Rank], *, timeout: int, port: int | None = None) -> list[Outcome]:
    """What each rank finds about the network, in real processes on this machine that pretend to be on several hosts."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    files = [folder / f"rank_{rank.number}.pickle" for rank in ranks]
    started = [
        FORKS.Process(target=_examine, args=(rank, port, timeout, str(file)))
        for rank, file in zip(ranks, files, strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(BOUND)
        assert process.exitcode == 0, process.exitcode
    return [pickle.loads(file.read_bytes()) for file in files]


HOST = """
import os, socket
from w2vscale.training import shared_folder

socket.gethostname = lambda: os.environ["HOST_OF_RANK"]
shared_folder.VISIBLE = 1.0  # second, in which a local disk shows a file
"""
"""What the processes that measure between ranks run first: each pretends to be on the host of its rank."""


def _examine(rank: Rank, port: int, timeout: int, file: str) -> None:
    customize = Path(file).with_suffix("")
    customize.mkdir()
    (customize / "sitecustomize.py").write_text(HOST)
    launcher = {
        "RANK": str(rank.number), "LOCAL_RANK": str(rank.local_rank), "WORLD_SIZE": str(rank.world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "HOST_OF_RANK": rank.host, "PYTHONPATH": f"{customize}{os.pathsep}{ROOT}",
    }  # fmt: skip
    os.environ.update({**launcher, **rank.environment})
    from w2vscale.diagnosis import doctor, meeting

    for name in [name for name, value in rank.environment.items() if value == ""]:
        del os.environ[name]
    socket.gethostname = lambda: rank.host
    doctor.LOCAL_CHECKS = 2.0  # time-outs
    facts = meeting.versions() | dict(rank.versions)
    meeting.versions = lambda: facts

    def local() -> Iterator[Finding]:
        time.sleep(rank.local_seconds)
        yield from rank.local

    findings, error = [], ""
    try:
        findings = list(doctor.examine_ranks(rank.exp, local, timeout=timeout))
    except UserError as refused:
        error = f"{type(refused).__name__}: {refused}"
    Path(file).write_bytes(pickle.dumps(Outcome(findings, error)))
