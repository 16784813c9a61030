"""A run on several hosts: one torchrun agent on each of them, as a cluster starts it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.hosts import Host, Hosts
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import ROOT

PORT = 29_400


class Agents:
    """`w2vscale train` on all `hosts`, with the folder of the run in `folder`/exp. host1 has the rendezvous.

    `nodes` is the option --nnodes of torchrun. What the agent and the ranks of a host print is in `folder`/hostN.txt.
    `program`: the arguments of Python for something else to run.
    """

    def __init__(
        self,
        hosts: Hosts,
        corpus: Path,
        folder: Path,
        settings: Sequence[str],
        *,
        nodes: str = "",
        processes: int = 1,
        restarts: int = 0,
        program: Sequence[str] = (),
    ) -> None:
        self.folder, self.exp = folder, folder / "exp"
        self.metrics = self.exp / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        command = ["-m", "w2vscale", "train", "base", *MICRO_RUN, f"data.train={corpus}", *settings]
        command += ["--exp", str(self.exp)]
        torchrun = [sys.executable, "-m", "w2vscale.distributed.torchrun", f"--nnodes={nodes or len(hosts)}"]
        torchrun += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--rdzv-backend=c10d"]
        # With fewer hosts than the most, the rendezvous waits `last_call_timeout` (30 seconds) for another one.
        torchrun += [f"--rdzv-endpoint={hosts[0].name}:{PORT}", "--rdzv-id=test", "--rdzv-conf=last_call_timeout=5"]
        self._torchrun, self._command = torchrun, program or command
        self.agents: dict[Host, subprocess.Popen[str]] = {}
        for host in hosts:
            self.start(host)

    def start(self, host: Host) -> None:
        """Start the agent of a host, also in the place of one that has ended."""
        self.agents[host] = host.start(
            [*self._torchrun, f"--local-addr={host.address}", *self._command],
            output=self.output(host),
            environment={"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            cwd=self.folder,
        )

    def output(self, host: Host) -> Path:
        """The file with what a host has printed."""
        return self.folder / f"{host.name}.txt"

    def printed(self) -> str:
        """What all hosts have printed."""
        return "\n".join(f"== {host.name}\n{self.output(host).read_text()}" for host in self.agents)

    def updates(self) -> list[int]:
        """The updates that the run has logged."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text().splitlines()
        return [record["update"] for line in lines if (record := _parsed(line)) is not None]

    def wait_for_update(self, update: int, *, seconds: float = 240.0) -> None:
        """Wait until an update is logged."""
        deadline = time.monotonic() + seconds
        while update not in self.updates():
            assert time.monotonic() < deadline, f"update {update} was not reached\n{self.printed()}"
            ended = [host.name for host, agent in self.agents.items() if agent.poll() is not None]
            assert len(ended) < len(self.agents), f"all have ended\n{self.printed()}"
            time.sleep(0.05)

    def finish(self, *, seconds: float = 300.0) -> list[float]:
        """Wait until the agents have ended with success; returns the loss of each update."""
        self.join(seconds)
        return self.losses()

    def wait_for(self, host: Host, text: str, *, seconds: float = 60.0) -> None:
        """Wait until a host has printed something."""
        deadline = time.monotonic() + seconds
        while text not in self.output(host).read_text():
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.05)

    def join(self, seconds: float) -> None:
        """Wait until the agents have ended with success."""
        deadline = time.monotonic() + seconds
        for host, agent in self.agents.items():
            try:
                code = agent.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{host.name} has not ended\n{self.printed()}") from None
            assert code == 0, f"{host.name} ended with {code}\n{self.printed()}"

    def losses(self) -> list[float]:
        """The loss of each update."""
        return [json.loads(line)["loss"] for line in self.metrics.read_text().splitlines()]


def _parsed(line: str) -> dict[str, int] | None:
    try:
        return json.loads(line)
    except ValueError:  # a part of a line
        return None
