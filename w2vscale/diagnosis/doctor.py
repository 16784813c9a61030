"""All checks in their order, on one machine or on all that a launcher has started processes on."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from w2vscale.diagnosis.child import Check, Children
from w2vscale.diagnosis.finding import Finding, fail, ok
from w2vscale.diagnosis.software import PACKAGES
from w2vscale.distributed.launch import LostRanks, launched, local_processes, number_in, ranked, slurm_tasks
from w2vscale.errors import TemporaryError, UserError
from w2vscale.runtime import DEBUG

if TYPE_CHECKING:
    from w2vscale.diagnosis.meeting import Meeting, Rank

AT_A_TIME = 4  # child processes; each imports libraries for seconds
LOCAL_CHECKS = 10.0  # times the time-out of one check, in which the checks of a machine end
MEASUREMENTS = 60.0  # seconds beyond the time-out, in which those between ranks end

SOFTWARE = (
    Check("installation", "software:installation", "Install w2vscale again."),
    Check("PyTorch", "software:pytorch", "Install it again: pip install --force-reinstall torch."),
    Check("GPU", "gpus:gpus", "Install the driver, and a PyTorch that fits it (pytorch.org/get-started)."),
    Check("DeepSpeed", "software:deepspeed", "pip install --force-reinstall 'w2vscale[deepspeed]'"),
    Check(
        "torchaudio",
        "software:torchaudio",
        "pip uninstall torchaudio: w2vscale does not need it, and Transformers fails with it. Its wheel on PyPI is "
        "built for CUDA, and does not load beside a CPU build of PyTorch.",
        broken="warn",
    ),
    Check("audio decoders", "audio:decoders", "pip install --force-reinstall soundfile numpy"),
    *(
        Check(
            package.name,
            "software:package",
            f"pip install --force-reinstall {package.name}{'' if package.extra is None else ', or uninstall it'}",
            broken="fail" if package.extra is None else "warn",
            arguments={"name": package.name},
        )
        for package in PACKAGES
    ),
)
USE_PYTORCH = ("GPU", "DeepSpeed", "torchaudio", "lhotse", "silero-vad")


def examine(exp: Path | None, *, timeout: float) -> Iterator[Finding]:
    """Yield all findings as they are made. Under a launcher, collective: the findings are those of rank 0.

    `exp`: the run folder, whose disk is measured; None: the current folder. `timeout`: seconds that a check may take,
    and that ranks wait for each other. Raises TemporaryError on a rank that loses rank 0.
    """
    world_size = max(number_in(os.environ, "WORLD_SIZE", 1), slurm_tasks(os.environ))
    ranks = local_processes(os.environ) or 1 if launched() else 0
    local = lambda: local_findings(exp or Path(), ranks=ranks, world_size=world_size, timeout=timeout)  # noqa: E731
    if launched() and world_size > 1:
        yield from examine_ranks(exp, local, timeout=timeout)
    else:
        yield from local()
        yield ok("network", "not checked: start it with --nproc-per-node N, torchrun or srun, as you start training")


def local_findings(folder: Path, *, ranks: int, world_size: int, timeout: float) -> Iterator[Finding]:
    """Everything but the network. `ranks`: processes that a launcher has started on this machine, or 0."""
    at_a_time = max(2, min(AT_A_TIME, len(os.sched_getaffinity(0))))
    with Children(timeout, at_a_time=at_a_time) as children:
        broken = False
        for check, future in [(check, children.start(check)) for check in SOFTWARE]:
            findings, completed = future.result()
            broken |= check.name == "PyTorch" and not completed
            if broken and check.name in USE_PYTORCH and not completed:
                findings = [fail(check.name, "not checked, because PyTorch does not work", "See PyTorch.")]
            yield from findings
        # One after the other: they measure.
        for check in (
            Check("machine", "machine:machine", "Report this as a bug of w2vscale.",
                  arguments={"ranks": ranks, "world_size": world_size}),
            Check("disk", "disk:disk", f"See whether ls and touch work in {folder.absolute()}.",
                  arguments={"folder": str(folder.absolute())}),
        ):  # fmt: skip
            yield from children.start(check).result()[0]


def examine_ranks(exp: Path | None, local: Callable[[], Iterator[Finding]], *, timeout: float) -> Iterator[Finding]:
    """Yield what `local` finds on each host, and what concerns the ranks together. Collective; see `examine`."""
    if DEBUG not in os.environ:
        # Hides stack traces of connections that fail, which the report names.
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    try:
        from w2vscale.diagnosis import links  # noqa: F401
        from w2vscale.diagnosis.meeting import Meeting, arrival_finding, order_finding, versions_finding
    except Exception as error:  # whatever a broken library raises
        text = f"{type(error).__name__}: {error}"
        if _is_main():
            yield fail("ranks", f"cannot meet, because a library does not load: {text}", "See the checks of software.")
            yield from local()
        else:
            print(f"error: a rank on {socket.gethostname()} cannot take part: {text}", file=sys.stderr)
        return
    try:
        meeting = Meeting(timeout)
    except UserError as error:
        if not _is_main():
            raise
        yield fail("ranks", str(error), "Correct it, and start all ranks again.")
        yield from local()
        return
    if meeting.rank > 0:
        _follow(meeting, local, exp, timeout)
        return
    arrived = meeting.arrived()
    complete = len(arrived) == meeting.world_size
    yield arrival_finding(arrived, meeting.world_size, address=meeting.address, timeout=timeout)
    meeting.set("hosts", json.dumps({rank: facts.host for rank, facts in arrived.items()}) if complete else "null")
    if not complete:
        yield from local()
        return
    yield versions_finding(arrived)
    yield order_finding(arrived)
    own = []
    for finding in local():
        own.append(finding)
        yield finding
    try:
        yield from _of_other_hosts(meeting, arrived, own)
    except TemporaryError as error:
        yield fail("other hosts", str(error), "See whether a rank has ended, and what it has printed.")
        meeting.set("measure", "false")
        return
    meeting.set("measure", "true")
    yield from _measured(_hosts(meeting), exp, timeout)


def _is_main() -> bool:
    """Whether this is rank 0."""
    return number_in(os.environ, "RANK" if ranked(os.environ) else "SLURM_PROCID", 0) == 0


def _follow(meeting: Meeting, local: Callable[[], Iterator[Finding]], exp: Path | None, timeout: float) -> None:
    """What ranks other than 0 do: the first one of a host looks at its machine, and all take part in measurements."""
    if json.loads(meeting.get("hosts", patience=2.0)) is None:
        return  # rank 0 reports who is missing
    if meeting.local_rank == 0:
        meeting.set(f"local/{meeting.rank}", json.dumps([asdict(finding) for finding in local()]))
    if json.loads(meeting.get("measure", patience=2 * LOCAL_CHECKS)):
        for _ in _measured(_hosts(meeting), exp, timeout):
            pass


def _hosts(meeting: Meeting) -> dict[str, list[int]]:
    """The ranks of each host, in the same order on all ranks."""
    hosts: dict[str, list[int]] = {}
    for rank, host in json.loads(meeting.get("hosts")).items():
        hosts.setdefault(host, []).append(int(rank))
    return hosts


def _of_other_hosts(meeting: Meeting, arrived: dict[int, Rank], own: Sequence[Finding]) -> Iterator[Finding]:
    """What is wrong with other machines and not, in the same way, with this one.

    Raises TemporaryError if one of them does not answer.
    """
    hosts: dict[Finding, list[str]] = {}
    others = {rank: facts.host for rank, facts in arrived.items() if rank > 0 and facts.local_rank == 0}
    for rank, host in others.items():
        try:
            text = meeting.get(f"local/{rank}", patience=LOCAL_CHECKS)
        except TemporaryError:
            raise TemporaryError(f"rank {rank} on {host} has not reported what it has found") from None
        for each in json.loads(text):
            if (finding := Finding(**each)).verdict != "ok" and finding not in own:
                hosts.setdefault(finding, []).append(host)
    for finding, where in hosts.items():
        yield replace(finding, name="other hosts", found=f"{', '.join(where)}: {finding.name}: {finding.found}")
    if others and not hosts:
        yield ok("other hosts", "nothing is wrong with them that is not reported above")


def _measured(hosts: dict[str, list[int]], exp: Path | None, timeout: float) -> Iterator[Finding]:
    """Join the process group as training does, and measure in it. Collective."""
    from w2vscale.diagnosis.links import measure
    from w2vscale.distributed.process_group import process_group

    guard = threading.Timer(timeout + MEASUREMENTS, _give_up)
    guard.daemon = True
    guard.start()
    try:
        with process_group(timeout=timedelta(seconds=timeout)) as (ranks, device):
            yield from measure(ranks, device, hosts, exp)
    except (LostRanks, RuntimeError) as error:  # RuntimeError: such as a lack of GPU memory
        if not _is_main():
            raise
        reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0])  # without the source file of gloo
        yield fail(
            "network",
            f"the ranks meet, but cannot communicate: {reason[:200]}",
            "Name the interface that joins the hosts in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and open all ports "
            "between them: only rank 0 has a fixed one. NCCL_DEBUG=INFO shows what NCCL tries.",
        )
    except UserError as error:  # of all ranks
        yield fail("network", str(error), "Start one process per GPU.")
    finally:
        guard.cancel()


def _give_up() -> None:
    """End this process: the other ranks hang in a collective that no exception ends."""
    print(f"error: {socket.gethostname()}: the ranks hang in a collective; NCCL_DEBUG=INFO shows more", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
