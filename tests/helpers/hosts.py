"""Several hosts on one machine: network namespaces, each with its own address, name and link to a switch.

Nothing in them reaches another network. They need Linux, root, and the programs ip and tc (Debian: iproute2).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.helpers.processes import ROOT, running

PREFIX = "w2vscale-"
NUMBERS = itertools.count()
NAMES = Path("/etc/netns")
"""`ip netns exec NAMESPACE` shows a process the files in /etc/netns/NAMESPACE as if they were in /etc."""

ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "TP_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@cache
def missing_for_hosts() -> str | None:
    """Why this machine cannot have such hosts, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [name for name in ("ip", "tc", "unshare", "hostname", "sysctl") if shutil.which(name) is None]:
        return f"{absent[0]} is not installed"
    try:
        for delays in (False, True):
            with Hosts(1, delays=delays) as hosts:
                hosts.limit(100)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"network namespaces cannot be made: {getattr(error, 'stderr', '').strip() or error}"
    return None


@dataclass(frozen=True)
class Host:
    """A host. Its only link is `interface`."""

    number: int
    namespace: str
    interface: str = "eth0"
    started: list[subprocess.Popen[str]] = field(default_factory=list, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The name by which hosts find each other."""
        return f"host{self.number}"

    @property
    def address(self) -> str:
        """Its IPv4 address."""
        return f"10.77.0.{self.number}"

    def start(
        self,
        command: Sequence[str | Path],
        *,
        output: Path | None = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a process on this host, as the leader of a new session. What it prints is appended to `output`."""
        named = ["sh", "-c", 'hostname "$1" && shift && exec "$@"', "sh", self.name]
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *named, *map(str, command)]
        stream = output.open("a") if output is not None else None
        try:
            process = subprocess.Popen(
                inside,
                env=os.environ | ENVIRONMENT | dict(environment or {}),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT if stream is not None else None,
                start_new_session=True,
                text=True,
            )
        finally:
            if stream is not None:
                stream.close()
        self.started.append(process)
        return process

    def sent(self) -> int:
        """Bytes that it has sent since it began, with all headers."""
        return int(_ip("netns", "exec", self.namespace, "cat", f"/sys/class/net/{self.interface}/statistics/tx_bytes"))

    def end_processes(self) -> None:
        """SIGKILL all that runs on it."""
        while pids := [pid for pid in map(int, _ip("netns", "pids", self.namespace).split()) if running(pid)]:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


class Hosts(Sequence[Host]):
    """`count` hosts in a `with` block, at whose end their processes are killed.

    `delays`: the switch is a program that can delay and lose packets (`worsen`), which costs some CPU time. Otherwise
    it is a bridge of the kernel.
    """

    def __init__(self, count: int, *, delays: bool = False) -> None:
        self.prefix = f"{PREFIX}{os.getpid()}-{next(NUMBERS)}-"
        self.bridge = f"{self.prefix}switch"
        self._hosts = [Host(number, f"{self.prefix}{number}") for number in range(1, count + 1)]
        self._delays = delays
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Hosts:
        _remove_left()
        try:
            for host in self._hosts:
                _ip("netns", "add", host.namespace)
            if self._delays:
                namespaces = [host.namespace for host in self._hosts]
                self._switch = subprocess.Popen(
                    ["nice", "-n", "-10", sys.executable, "-m", "tests.helpers.software_switch", *namespaces],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                self._answer()
            else:
                self._join_by_a_bridge()
            names = "".join(f"{host.address} {host.name}\n" for host in self._hosts)
            for host in self._hosts:
                (NAMES / host.namespace).mkdir(parents=True, exist_ok=True)
                (NAMES / host.namespace / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
                _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
                for link in (host.interface, "lo"):
                    _ip("-n", host.namespace, "link", "set", link, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._switch is not None:
            with self._switch:  # closes its pipes and waits
                self._switch.kill()
        _remove(self.prefix)
        for host in self._hosts:
            for process in host.started:
                process.wait()

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        return self._hosts[place]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def limit(self, megabits: float) -> None:
        """Limit what each host sends to this many megabits per second."""
        settings = ["rate", f"{megabits}mbit", "burst", "128kb", "latency", "200ms"]
        for host in self._hosts:
            _run("tc", "-n", host.namespace, "qdisc", "replace", "dev", host.interface, "root", "tbf", *settings)

    def worsen(self, *, delay: float = 0.0, loss: float = 0.0) -> None:
        """Delay each packet by this many seconds, and lose this share of them. Needs `delays`."""
        for host in self._hosts:
            self._change(host, delay=delay, loss=loss)

    def cut(self, host: Host) -> None:
        """Lose every packet to and from a host, without a word to anybody."""
        if self._switch is not None:
            self._change(host, cut=True)
        else:
            _ip("-n", self.bridge, "link", "set", host.name, "nomaster")

    def reconnect(self, host: Host) -> None:
        """Undo `cut`."""
        if self._switch is not None:
            self._change(host, cut=False)
        else:
            _ip("-n", self.bridge, "link", "set", host.name, "master", "bridge")

    def give_up_after(self, retries: int) -> None:
        """End connections after this many retries of a packet. Linux has 15, which takes a quarter of an hour."""
        for host in self._hosts:
            _ip("netns", "exec", host.namespace, "sysctl", "-qw", f"net.ipv4.tcp_retries2={retries}")

    def kill(self, host: Host) -> None:
        """Cut a host off, and end all of its processes: to the others it is as if its power were gone."""
        self.cut(host)
        host.end_processes()

    def _join_by_a_bridge(self) -> None:
        _ip("netns", "add", self.bridge)
        _ip("-n", self.bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.bridge, "link", "set", "bridge", "up")
        for host in self._hosts:
            other_end = ("type", "veth", "peer", "name", host.name, "netns", self.bridge)
            _ip("-n", host.namespace, "link", "add", host.interface, *other_end)
            _ip("-n", self.bridge, "link", "set", host.name, "master", "bridge", "up")

    def _change(self, host: Host, **change: float) -> None:
        assert self._switch is not None and self._switch.stdin is not None, "needs delays=True"
        self._switch.stdin.write(json.dumps({"port": host.number - 1, **change}) + "\n")
        self._switch.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._switch is not None and self._switch.stdout is not None
        if not self._switch.stdout.readline():
            raise OSError("the software switch did not start")


def _remove_left() -> None:
    """Remove the hosts of processes that were killed."""
    for namespace in _namespaces():
        owner = namespace.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not running(int(owner)):
            _remove(f"{PREFIX}{owner}-")


def _remove(prefix: str) -> None:
    for namespace in _namespaces():
        if namespace.startswith(prefix):
            Host(0, namespace).end_processes()
            _ip("netns", "delete", namespace)
            shutil.rmtree(NAMES / namespace, ignore_errors=True)
    with suppress(OSError):
        NAMES.rmdir()


def _namespaces() -> list[str]:
    return [name for line in _ip("netns", "list").splitlines() if (name := line.split()[0]).startswith(PREFIX)]


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
