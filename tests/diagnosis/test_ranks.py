"""The network between ranks: real processes that meet over the loopback address, or do not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.doctor import BOUND, Rank, doctor, examined, parsed
from tests.helpers.hosts import Hosts, missing_for_hosts
from tests.helpers.processes import ROOT
from w2vscale.diagnosis.finding import Finding, fail, ok

pytestmark = pytest.mark.distributed


def two_hosts(**options: object) -> list[Rank]:
    """One rank on each of two hosts."""
    return [Rank(number, 2, host=f"node{number + 1}", **options) for number in range(2)]  # type: ignore[arg-type]


def verdicts(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.verdict for name, finding in findings.items()}


def test_two_ranks_of_a_host(tmp_path: Path) -> None:
    """The launcher is srun."""
    slurm = {
        "RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "MASTER_ADDR": "", "MASTER_PORT": "",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip
    ranks = [
        Rank(
            number,
            2,
            local_rank=number,
            environment={**slurm, "SLURM_PROCID": f"{number}", "SLURM_LOCALID": f"{number}"},
        )
        for number in range(2)
    ]
    first, second = examined(tmp_path, ranks, timeout=60)
    assert verdicts(first.findings).keys() == {"ranks", "same software", "rank order", "all-reduce in a host"}
    assert first.findings["ranks"] == ok("ranks", "2 ranks on 1 host (node1: 0–1)")
    assert first.findings["same software"].verdict == first.findings["rank order"].verdict == "ok"
    assert "between 2 ranks (gloo" in first.findings["all-reduce in a host"].found
    assert (second.findings, second.error) == ({}, "")


def test_two_hosts(tmp_path: Path) -> None:
    """What is wrong with the second machine is in the report of the first; what is fine there is not."""
    ranks = two_hosts(exp=tmp_path / "exp" / "new", local=(ok("memory", "much"), fail("open files", "few", "more")))
    first, _ = examined(tmp_path, ranks, timeout=60)
    assert first.findings["ranks"].found == "2 ranks on 2 hosts (node1: 0; node2: 1)"
    assert first.findings["open files"].verdict == "fail"
    assert first.findings["node2: open files"] == fail("node2: open files", "few", "more")
    assert "node2: memory" not in first.findings
    assert first.findings["clocks"].verdict == "ok"
    assert first.findings["shared folder"] == ok("shared folder", f"{tmp_path} is the same on 2 hosts")
    assert "between 2 ranks (gloo" in first.findings["all-reduce across hosts"].found
    assert "all-reduce in a host" not in first.findings
    assert not (tmp_path / "exp").exists() and not list(tmp_path.glob(".w2vscale*"))


def test_hosts_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own run folder, and another version of torch. The ranks are not consecutive."""
    ranks = [
        Rank(0, 3, host="node1", exp=tmp_path / "a", environment={"LOCAL_WORLD_SIZE": "1"}),
        Rank(
            1, 3, host="node2", exp=tmp_path / "b", versions={"torch": "2.11.0"}, environment={"LOCAL_WORLD_SIZE": "1"}
        ),
        Rank(2, 3, host="node1", local_rank=1, exp=tmp_path / "a", environment={"LOCAL_WORLD_SIZE": "2"}),
    ]
    for folder in "ab":
        (tmp_path / folder).mkdir()
    first, *_ = examined(tmp_path, ranks, timeout=60)
    assert first.findings["ranks"].found == "3 ranks on 2 hosts (node1: 0, 2; node2: 1)"
    software = first.findings["same software"]
    assert software.verdict == "fail" and "torch: " in software.found and "2.11.0 on 1)" in software.found
    assert first.findings["rank order"].verdict == "warn"
    assert first.findings["shared folder"].verdict == "fail"
    assert f"{tmp_path}/a on node1 (rank 0) is not the one on node2" in first.findings["shared folder"].found
    assert first.findings["other hosts"] == ok("other hosts", "no problems found on node2")


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    """The others end in time, and rank 0 still looks at its own machine."""
    ranks = [Rank(0, 5, local=(ok("memory", "much"),)), Rank(2, 5, host="node2")]
    first, third = examined(tmp_path, ranks, timeout=4)
    missing = first.findings["ranks"]
    assert missing.verdict == "fail"
    assert missing.found.startswith("ranks 1, 3–4 have not come to 127.0.0.1:")
    assert missing.found.endswith("within 4 s; here are node1: 0; node2: 2")
    assert verdicts(first.findings) == {"ranks": "fail", "memory": "ok"}
    assert third.findings == {}


def test_a_missing_rank_0_is_named(tmp_path: Path) -> None:
    (second,) = examined(tmp_path, [Rank(1, 2)], timeout=1)
    assert second.error.startswith("TemporaryError: rank 1 on node1 does not reach rank 0 at 127.0.0.1:")
    assert "\n" not in second.error


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        (first,) = examined(tmp_path, [Rank(0, 2)], timeout=1, port=other.getsockname()[1])
    assert first.findings["ranks"].verdict == "fail"
    assert "rank 0 cannot listen at 127.0.0.1:" in first.findings["ranks"].found


def test_ranks_that_meet_and_cannot_communicate(tmp_path: Path) -> None:
    """gloo is told to use an interface that no machine has."""
    ranks = [
        Rank(number, 2, local_rank=number, environment={"GLOO_SOCKET_IFNAME": "nonexistent0"}) for number in range(2)
    ]
    first, second = examined(tmp_path, ranks, timeout=20)
    assert first.findings["ranks"].verdict == "ok"
    assert first.findings["network"].verdict == "fail"
    assert "nonexistent0" in first.findings["network"].found
    assert "GLOO_SOCKET_IFNAME" in first.findings["network"].advice
    assert second.error.startswith("LostRanks: ")


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["nproc", "torchrun"])
def test_the_command_under_a_launcher(launcher: str, tmp_path: Path) -> None:
    if launcher == "nproc":
        report = doctor("--exp", tmp_path, "--nproc-per-node", 2)
    else:
        torchrun = ["-m", "w2vscale.distributed.torchrun", "--nproc-per-node", "2", "--rdzv-endpoint", "127.0.0.1:0"]
        done = subprocess.run(
            [sys.executable, *torchrun, "-m", "w2vscale", "doctor", "--exp", tmp_path],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=BOUND, check=False,
        )  # fmt: skip
        report = parsed(done.returncode, done.stdout, done.stderr)
    rows = report.rows
    assert rows["ranks"].text == f"2 ranks on 1 host ({socket.gethostname()}: 0–1)", report
    assert rows["rank order"].verdict == rows["PyTorch"].verdict == rows["same software"].verdict == "ok"
    assert "for 2 ranks" in rows["memory"].text
    assert rows["all-reduce in a host"].verdict in ("ok", "warn")
    assert report.code == int(any(row.verdict == "fail" for row in rows.values()))
    assert "Traceback" not in report.errors


@pytest.mark.long
def test_two_hosts_with_a_slow_link(tmp_path: Path) -> None:
    """Network namespaces with an address each; 40 Mb/s are a 25th of what the report asks for."""
    if missing := missing_for_hosts():
        pytest.skip(missing)
    command = [sys.executable, "-m", "w2vscale", "doctor", "--exp", str(tmp_path / "exp")]
    with Hosts(2) as hosts:
        hosts.limit(40)
        started = []
        for rank, host in enumerate(hosts):
            launcher = {
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29511", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            started.append(host.start(command, output=tmp_path / f"{rank}.log", environment=launcher, cwd=tmp_path))
        for process in started:
            process.wait(BOUND)
    printed = (tmp_path / "0.log").read_text()
    rows = parsed(0, printed).rows
    assert rows["ranks"].text == "2 ranks on 2 hosts (host1: 0; host2: 1)", printed
    assert rows["shared folder"].verdict == rows["clocks"].verdict == rows["rank order"].verdict == "ok"
    assert rows["all-reduce across hosts"].verdict == "warn"
    assert "slower than an Ethernet of 1 Gb/s" in rows["all-reduce across hosts"].text
    assert "GLOO_SOCKET_IFNAME" in rows["all-reduce across hosts"].text
    assert (tmp_path / "1.log").read_text() == ""
