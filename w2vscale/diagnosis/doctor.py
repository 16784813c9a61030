"""All checks in their order, on one machine or on all that a launcher has started processes on."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from w2vscale.diagnosis.child import Check, Children
from w2vscale.diagnosis.finding import Finding, Verdict, fail, listed, ok
from w2vscale.diagnosis.requirements import reinstall
from w2vscale.diagnosis.software import INSTALL, PACKAGES
from w2vscale.distributed.launch import launched, local_processes, number_in, ranked, slurm_tasks
from w2vscale.errors import TemporaryError, UserError

if TYPE_CHECKING:
    from w2vscale.diagnosis.meeting import Meeting

AT_A_TIME = 4  # child processes; each imports libraries for seconds
LOCAL_CHECKS = 10.0  # times the time-out of one check, in which the checks of a machine end
USE_PYTORCH = ("GPU", "DeepSpeed", "safetensors", "tensorboard", "lhotse", "torchaudio", "transformers", "silero-vad")
NCCL_LOG = "With NCCL_DEBUG=INFO NCCL_DEBUG_FILE=nccl.%h.%p, NCCL writes to a file"
NO_NETWORK = (
    "Name the interface that joins the hosts in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and open all ports between "
    f"them: only rank 0 has a fixed one. Inside a host, try NCCL_P2P_DISABLE=1. {NCCL_LOG} what it tries."
)


def examine(exp: Path | None, *, timeout: float) -> Generator[Finding]:
    """Yield all findings as they are made. Under a launcher, collective: the findings are those of rank 0.

    `exp`: the run folder, whose disk is measured; None: the current folder. `timeout`: seconds that a check may take,
    and that ranks wait for each other. Raises TemporaryError on a rank that loses rank 0.
    """
    world_size = max(number_in(os.environ, "WORLD_SIZE", 1), slurm_tasks(os.environ))
    ranks = local_processes(os.environ) or 1 if launched() else 0
    local = partial(local_findings, exp or Path(), ranks=ranks, world_size=world_size, timeout=timeout)
    if launched() and world_size > 1:
        yield from examine_ranks(exp, local, timeout=timeout)
    else:
        yield from local()
        yield ok("network", "not checked: start it with --nproc-per-node N, torchrun or srun, as you start training")


def software_checks() -> Iterator[Check]:
    """Each of them imports a library."""
    yield Check("installation", "software:installation", INSTALL)
    torch = f"Install it again, from the index that pytorch.org/get-started names: {reinstall('torch')}"
    yield Check("PyTorch", "software:pytorch", torch)
    yield Check("GPU", "gpus:gpus", "Install the driver, and a PyTorch that fits it (pytorch.org/get-started).")
    deepspeed = f"{reinstall('deepspeed', 'deepspeed')}, or use engine.name=fsdp"
    yield Check("DeepSpeed", "software:deepspeed", deepspeed)
    yield Check("audio decoders", "audio:decoders", reinstall("soundfile"))
    for package in PACKAGES:
        advice = package.advice or reinstall(package.name, package.extra or "")
        broken: Verdict = "fail" if package.extra is None else "warn"
        yield Check(package.name, "software:package", advice, broken, {"name": package.name})


def local_findings(folder: Path, *, ranks: int, world_size: int, timeout: float) -> Iterator[Finding]:
    """Everything but the network. `ranks`: processes that a launcher has started on this machine, or 0."""
    at_a_time = max(2, min(AT_A_TIME, len(os.sched_getaffinity(0))))
    with Children(timeout, at_a_time=at_a_time) as children:
        broken = False
        for check, future in [(check, children.start(check)) for check in software_checks()]:
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


def network_findings(exp: Path | None, hosts: list[str], *, timeout: float) -> Iterator[Finding]:
    """What the ranks measure together. In child processes: a collective that hangs is stopped with its process."""
    arguments = {"hosts": hosts, "exp": None if exp is None else str(exp)}
    # This process of rank 0 serves the store, so the children only connect to it.
    store = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with Children(timeout, at_a_time=1) as children:
        check = Check("network", "links:network", NO_NETWORK, arguments=arguments, environment=store)
        yield from children.start(check).result()[0]


def examine_ranks(exp: Path | None, local: Callable[[], Iterator[Finding]], *, timeout: float) -> Iterator[Finding]:
    """Yield what `local` finds on each host, and what concerns the ranks together. Collective; see `examine`."""
    rank = number_in(os.environ, "RANK" if ranked(os.environ) else "SLURM_PROCID", 0)
    try:
        meeting = _meeting(timeout)
    except TemporaryError:
        raise
    except UserError as error:
        if rank == 0:
            yield fail("ranks", str(error), "Correct this, and start all ranks again.")
            yield from local()
        else:  # but exit with code 0: otherwise the launcher would stop rank 0
            print(f"error: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr)
        return
    if rank == 0:
        arrived = meeting.arrived()
        complete = len(arrived) == meeting.world_size
        meeting.set("hosts", json.dumps([facts["host"] for facts in arrived.values()] if complete else None))
        yield meeting.arrival(arrived)
        if complete:
            yield meeting.same_versions(arrived)
        else:
            yield from local()
    if (hosts := json.loads(meeting.get("hosts", patience=2.0))) is None:  # rank 0 has named the missing ranks
        return
    first = {hosts.index(host): host for host in hosts}  # the first rank of each host
    everyone = {number: f"rank {number} on {host}" for number, host in enumerate(hosts)}
    try:
        if rank in first:
            yield from _together(meeting, "local", first, local())
        if rank == 0:
            meeting.set("measure", "true")
        elif not json.loads(meeting.get("measure", patience=2 * LOCAL_CHECKS)):
            return  # rank 0 has named the host that did not report
        yield from _together(meeting, "network", everyone, network_findings(exp, hosts, timeout=timeout))
    except TemporaryError as error:
        if rank > 0:
            raise
        meeting.set("measure", "false")
        yield fail("other hosts", str(error), "See whether this rank has ended, and what it has printed.")


def _meeting(timeout: float) -> Meeting:
    """Connect the ranks. Raises UserError if this cannot work, and TemporaryError if rank 0 is not reached."""
    try:
        from w2vscale.diagnosis.meeting import Meeting
    except Exception as error:  # whatever a broken library raises
        raise UserError(f"cannot meet, because a library does not load: {type(error).__name__}: {error}") from error
    return Meeting(timeout)


def _together(meeting: Meeting, key: str, ranks: Mapping[int, str], own: Iterable[Finding]) -> Iterator[Finding]:
    """On rank 0, yield its own findings, and the problems of others that it does not have in the same way.

    `ranks`: those that call this, and what the report calls them. Raises TemporaryError if one does not answer rank 0.
    """
    mine = []
    for finding in own:
        mine.append(finding)
        if meeting.rank == 0:
            yield finding
    if meeting.rank > 0:
        meeting.set(f"{key}/{meeting.rank}", json.dumps([asdict(finding) for finding in mine]))
        return
    found: dict[Finding, list[str]] = {}
    for rank in filter(None, ranks):
        try:
            text = meeting.get(f"{key}/{rank}", patience=LOCAL_CHECKS)
        except TemporaryError:
            raise TemporaryError(f"{ranks[rank]} has not reported what it has found") from None
        for each in json.loads(text):
            if (finding := Finding(**each)).verdict != "ok" and finding not in mine:
                found.setdefault(finding, []).append(ranks[rank])
    name = "other hosts" if key == "local" else "other ranks"
    for finding, where in found.items():
        yield replace(finding, name=name, found=f"{listed(where)}: {finding.name}: {finding.found}")
