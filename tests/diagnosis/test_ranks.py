"""The network between ranks: real processes that meet over the loopback address, or do not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.doctor import BOUND, Outcome, Rank, doctor, examined, parsed, stub
from tests.helpers.hosts import Hosts, missing_for_hosts
from tests.helpers.processes import ROOT
from w2vscale.diagnosis import links
from w2vscale.diagnosis.doctor import NO_NETWORK
from w2vscale.diagnosis.finding import fail, ok, warn
from w2vscale.distributed.launch import LostRanks
from w2vscale.errors import UserError

pytestmark = pytest.mark.distributed


def names(outcome: Outcome) -> list[str]:
    return [finding.name for finding in outcome.findings]


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
    assert names(first) == ["ranks", "same software", "links in a host"]
    assert first["ranks"] == ok("ranks", "2 ranks on 1 host: node1 (2)")
    assert first["same software"].verdict == "ok"
    assert "between 2 ranks (gloo" in first["links in a host"].found
    assert (second.findings, second.error) == ([], "")


def test_two_hosts(tmp_path: Path) -> None:
    """What is wrong with the second machine alone is in the report of the first."""
    shared = {"exp": tmp_path / "exp" / "new"}
    both = (ok("memory", "much"), warn("GPU", "none", "buy one"))
    ranks = [
        Rank(0, 2, host="node1", local=both, **shared),
        Rank(1, 2, host="node2", local=(*both, fail("open files", "few", "more")), **shared),
    ]
    first, _ = examined(tmp_path, ranks, timeout=60)
    assert first["ranks"].found == "2 ranks on 2 hosts: node1 (1), node2 (1)"
    assert first["GPU"].verdict == "warn" and first["memory"].verdict == "ok"
    assert first["other hosts"] == fail("other hosts", "node2: open files: few", "more")
    assert first["shared folder"] == ok("shared folder", f"{tmp_path} is the same on all hosts")
    assert "between 2 ranks (gloo" in first["links across hosts"].found
    assert "links in a host" not in names(first)
    assert not (tmp_path / "exp").exists() and not list(tmp_path.glob(".w2vscale*"))


def test_hosts_that_differ(tmp_path: Path) -> None:
    """Each has its own run folder, and another version of torch. The ranks are not consecutive."""
    ranks = [
        Rank(0, 3, host="node1", exp=tmp_path / "a"),
        Rank(1, 3, host="node2", exp=tmp_path / "b", versions={"torch": "2.11.0"}),
        Rank(2, 3, host="node1", local_rank=1, exp=tmp_path / "a"),
    ]
    for folder in "ab":
        (tmp_path / folder).mkdir()
    first, *_ = examined(tmp_path, ranks, timeout=60)
    assert first["ranks"].found == "3 ranks on 2 hosts: node1 (2), node2 (1)"
    software = first["same software"]
    assert software.verdict == "fail" and software.found.endswith(" on rank 0, 2.11.0 on rank 1")
    assert first["shared folder"].verdict == "fail"
    assert f"{tmp_path}/a on node1 (rank 0) is not the one on node2" in first["shared folder"].found
    assert "other hosts" not in names(first)


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    """The others end in time, and rank 0 still looks at its own machine."""
    ranks = [Rank(0, 5, local=(ok("memory", "much"),)), Rank(2, 5, host="node2")]
    first, third = examined(tmp_path, ranks, timeout=4)
    missing = first["ranks"]
    assert missing.verdict == "fail"
    assert missing.found.startswith("3 ranks (1, 3, 4) did not connect to 127.0.0.1:")
    assert missing.found.endswith("within 4 s; connected: node1 (1), node2 (1)")
    assert names(first) == ["ranks", "memory"]
    assert (third.findings, third.error) == ([], "")


@pytest.mark.long
def test_a_host_that_does_not_answer(tmp_path: Path) -> None:
    """Its checks take longer than all ranks wait; all end all the same."""
    ranks = [Rank(0, 2), Rank(1, 2, host="node2", local_seconds=8.0, local=(ok("memory", "much"),))]
    first, second = examined(tmp_path, ranks, timeout=2)
    assert names(first) == ["ranks", "same software", "other hosts"]
    assert first["other hosts"].verdict == "fail" and "node2 has not reported" in first["other hosts"].found
    assert second.findings == []


def test_a_missing_rank_0_is_named(tmp_path: Path) -> None:
    (second,) = examined(tmp_path, [Rank(1, 2)], timeout=1)
    assert second.error.startswith("TemporaryError: rank 1 on node1 does not reach rank 0 at 127.0.0.1:")
    assert "\n" not in second.error


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        (first,) = examined(tmp_path, [Rank(0, 2)], timeout=1, port=other.getsockname()[1])
    assert first["ranks"].verdict == "fail"
    assert "rank 0 cannot listen at 127.0.0.1:" in first["ranks"].found


def test_ranks_that_meet_and_cannot_communicate(tmp_path: Path) -> None:
    """gloo is told to use an interface that no machine has."""
    ranks = [
        Rank(number, 2, local_rank=number, environment={"GLOO_SOCKET_IFNAME": "nonexistent0"}) for number in range(2)
    ]
    first, second = examined(tmp_path, ranks, timeout=20)
    assert first["ranks"].verdict == "ok"
    assert first["network"].verdict == "fail"
    assert "nonexistent0" in first["network"].found
    assert "GLOO_SOCKET_IFNAME" in first["network"].advice
    assert (second.findings, second.error) == ([], "")  # rank 0 speaks for it
    assert "other ranks" not in names(first)


def test_a_rank_whose_failure_hangs_the_others(tmp_path: Path) -> None:
    """Rank 0 only notices that nothing happens; rank 1 knows why."""
    ranks = [Rank(0, 2), Rank(1, 2, host="node2", environment={"GLOO_SOCKET_IFNAME": "nonexistent0"})]
    first, _ = examined(tmp_path, ranks, timeout=8)
    assert first["network"].verdict == first["other ranks"].verdict == "fail"
    assert first["other ranks"].found.startswith("rank 1 on node2: network: ")
    assert "nonexistent0" in first["other ranks"].found


def test_a_rank_that_hangs(tmp_path: Path) -> None:
    """Its process is suspended before it joins the process group: the others end, and the report says what to do."""
    stubs = stub(tmp_path / "stubs", torch="import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n")
    hanging = {"PYTHONPATH": f"{stubs}{os.pathsep}{ROOT}"}
    ranks = [Rank(0, 2), Rank(1, 2, local_rank=1, environment=hanging)]
    first, _ = examined(tmp_path, ranks, timeout=8)
    assert first["ranks"].verdict == "ok"
    assert first["network"] == fail("network", "does not end within 8 s", NO_NETWORK)


def test_why_ranks_cannot_communicate() -> None:
    """Messages of PyTorch and NCCL. Lack of memory has nothing to do with network interfaces."""
    full = links.failure(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"))
    assert full.verdict == "fail" and "CUDA out of memory" in full.found and "nvidia-smi" in full.advice
    nccl = "NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error\nncclUnhandledCudaError: Call failed.\n"
    full = links.failure(LostRanks(f"{nccl}Last error:\nFailed to CUDA calloc async 2432 bytes: out of memory"))
    assert "calloc async 2432 bytes: out of memory" in full.found and "nvidia-smi" in full.advice
    lost = links.failure(LostRanks(f"{nccl}Last error:\nsocketStartConnect: Connect to 10.0.0.2 failed"))
    assert lost.found == "the ranks meet, but cannot communicate: socketStartConnect: Connect to 10.0.0.2 failed"
    assert "NCCL_SOCKET_IFNAME" in lost.advice and "NCCL_DEBUG_FILE" in lost.advice
    lost = links.failure(LostRanks("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9834"))
    assert lost.found.endswith("communicate: Connection closed by peer [127.0.0.1]:9834")
    shared = links.failure(UserError("ranks 0, 1 would share one GPU of node1"))
    assert shared == fail("network", "ranks 0, 1 would share one GPU of node1", "Start one process per GPU.")
    assert links.failure(RuntimeError("")).found.endswith("RuntimeError")


@pytest.mark.long
def test_ranks_whose_pytorch_does_not_load(tmp_path: Path) -> None:
    stubs = stub(tmp_path / "stubs", torch="raise OSError('libtorch.so: cannot open shared object file')\n")
    report = doctor("--exp", tmp_path, "--nproc-per-node", 2, path=[stubs])
    assert report.rows["ranks"].verdict == report.rows["PyTorch"].verdict == "fail"
    assert "libtorch.so" in report.rows["ranks"].text and "libtorch.so" in report.rows["PyTorch"].text
    assert report.rows["disk space"].verdict in ("ok", "warn")
    assert report.code == 1 and "Traceback" not in report.errors


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["nproc", "torchrun"])
def test_the_command_under_a_launcher(launcher: str, tmp_path: Path) -> None:
    if launcher == "nproc":
        report = doctor("--exp", tmp_path, "--nproc-per-node", 2)
    else:
        torchrun = ["-m", "w2vscale.distributed.torchrun", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [sys.executable, *torchrun, "-m", "w2vscale", "doctor", "--exp", tmp_path],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=BOUND, check=False,
        )  # fmt: skip
        report = parsed(done.returncode, done.stdout, done.stderr)
    rows = report.rows
    assert rows["ranks"].text == f"2 ranks on 1 host: {socket.gethostname()} (2)", report
    assert rows["PyTorch"].verdict == rows["same software"].verdict == "ok"
    assert "for 2 ranks" in rows["memory"].text
    assert rows["links in a host"].verdict in ("ok", "warn")
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
    assert rows["ranks"].text == "2 ranks on 2 hosts: host1 (1), host2 (1)", printed
    assert rows["shared folder"].verdict == "ok"
    assert "links across hosts" in rows, printed
    assert rows["links across hosts"].verdict == "warn"
    assert "slower than an Ethernet of 1 Gb/s" in rows["links across hosts"].text
    assert "GLOO_SOCKET_IFNAME" in rows["links across hosts"].text
    assert (tmp_path / "1.log").read_text() == ""
