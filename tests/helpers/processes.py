"""Processes of tests. Importing torch takes seconds: most are forked from one that has done it."""

from __future__ import annotations

import ast
import multiprocessing
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Started = Callable[[], list[BaseProcess]]
"""The processes that a test itself has started and that still run."""

FORKS = multiprocessing.get_context("forkserver")
"""Each process of pytest-xdist has one server, which starts with the first process."""
FORKS.set_forkserver_preload(
    # torch._dynamo: what torch imports when it first draws on the meta device. The optimizer: DeepSpeed imports it, and
    # with it torch's compiler, whenever it builds an engine.
    [
        "tests.helpers.tasks",
        "tests.helpers.semantics",
        "w2vscale.cli.app",
        "w2vscale.cli.train",
        "deepspeed",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch._dynamo",
    ]
)


class Command:
    """A running `w2vscale ARGUMENTS` whose output goes to a file, with some more environment variables."""

    def __init__(self, output: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.output = output
        self.process = FORKS.Process(target=_run, args=(str(output), arguments, dict(environment or {})))
        self.process.start()

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def finish(self, *, code: int, timeout: float) -> str:
        """Wait until it ends with `code` (minus the signal that killed it); returns its output."""
        self.process.join(timeout)
        printed = self.output.read_text()
        assert self.process.exitcode == code, f"{self.process.exitcode}\n{printed}"
        return printed


def running(process: int) -> bool:
    """Whether a process runs, and is not merely waiting to be collected."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def fork_children() -> None:
    """Have this process start its own as a trainer does: forked from itself, so that they end when it is killed."""
    multiprocessing.set_start_method("fork", force=True)


def _run(output: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    _command(arguments, [0, file, file])


def _command(arguments: Sequence[str], files: Sequence[int]) -> None:
    fork_children()
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.argv = ["w2vscale", *arguments]
    from w2vscale.cli.app import main

    main()


CLIENT = """#!{python} -IS
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [repr((sys.argv[1:], os.getcwd(), dict(os.environ))).encode()], [0, 1, 2])
sys.exit(int(server.recv(9)))
"""


def setup_key(root: Path) -> str:
    """What tools/setup.sh writes once an environment is complete, so that it has nothing to do."""
    files = ("pyproject.toml", "tools/constraints.txt", "tools/setup.sh")
    hashes = [f"{sha256((root / name).read_bytes()).hexdigest()}  {name}" for name in files]
    torch = filter(None, [os.environ.get("TORCH")])
    return "\n".join([str(root), f"Python {platform.python_version()}", *torch, *hashes]) + "\n"


def linked_environment(folder: Path) -> None:
    """Make `folder` a copy of this environment that nothing can be installed into."""
    here = Path(sys.prefix)
    (folder / "bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", "lib"):
        (folder / name).symlink_to(here / name)
    # A file of its own: a link would let tools/setup.sh write to this environment, or install into it.
    (folder / ".w2vscale-setup").write_text(setup_key(ROOT))
    for program in (here / "bin").iterdir():
        (folder / "bin" / program.name).symlink_to(program)


def served_environment(folder: Path) -> BaseProcess:
    """Make `folder` a copy of this environment whose `w2vscale` runs in forks of a process that has made the imports.

    Returns that process, which serves until it is killed.
    """
    linked_environment(folder)
    address = str(folder / "socket")
    client = folder / "bin" / "w2vscale"
    client.unlink()
    client.write_text(CLIENT.format(python=Path(sys.prefix) / "bin" / "python", address=address))
    client.chmod(0o755)
    listening = FORKS.Event()
    server = FORKS.Process(target=_serve_commands, args=(address, listening))
    server.start()
    assert listening.wait(60)
    return server


def _serve_commands(address: str, listening: Event) -> None:
    """One command after the other."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        listening.set()
        while True:
            client, _ = server.accept()
            with client:
                asked, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
                arguments, folder, environment = ast.literal_eval(asked.decode())
                child = multiprocessing.get_context("fork").Process(
                    target=_asked, args=(folder, environment, arguments, files)
                )
                child.start()
                for file in files:
                    os.close(file)
                child.join()
                client.send(str(child.exitcode).encode())


def _asked(folder: str, environment: dict[str, str], arguments: list[str], files: list[int]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _command(arguments, files)
