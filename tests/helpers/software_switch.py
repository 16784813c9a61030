"""A network switch as a program: it delays and loses what it forwards. Few kernels here can (`tc` with netem).

    python -m tests.helpers.software_switch NAMESPACE …

Each network namespace gets an interface eth0 whose other end is this program. Lines on stdin change a port:
{"port": 0, "delay": 0.05, "loss": 0.01, "cut": false}, in seconds and shares; each is answered by an empty line. At the
end of stdin it ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import selectors
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
FRAME = 65_536  # bytes, at most
BROADCAST = b"\xff" * 6


@dataclass
class Port:
    """One end of a link. Frames are delayed, and lost, where they enter the switch; a port that is cut passes none."""

    device: int
    delay: float = 0.0
    loss: float = 0.0
    cut: bool = False


def enter(namespace: str) -> None:
    """Move this process into the network namespace that the file `namespace` stands for."""
    with open(namespace) as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def open_link(namespace: str) -> int:
    """Make the interface eth0 in a network namespace. Returns the file with its frames."""
    enter(f"/run/netns/{namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"eth0", IFF_TAP_WITHOUT_HEADER))
    enter(f"/proc/{os.getppid()}/ns/net")  # what runs in the namespace of a host ends with it
    return device


def run(ports: list[Port]) -> None:
    """Forward frames until stdin ends."""
    chance, numbers = random.Random(0), itertools.count()
    waiting: list[tuple[float, int, Port, bytes]] = []  # frames in the order in which they leave
    known: dict[bytes, Port] = {}  # the port behind which an address was seen
    ready = selectors.DefaultSelector()
    ready.register(sys.stdin.buffer.raw, selectors.EVENT_READ)  # type: ignore[attr-defined]
    for port in ports:
        ready.register(port.device, selectors.EVENT_READ, port)
    while True:
        pause = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else None
        for key, _ in ready.select(pause):
            if key.data is None:
                line = sys.stdin.buffer.readline()
                if not line:
                    return
                change = json.loads(line)
                vars(ports[change.pop("port")]).update(change)
                print(flush=True)
                continue
            source: Port = key.data
            frame = os.read(source.device, FRAME)
            to, sender = frame[:6], frame[6:12]
            known[sender] = source
            if source.cut or chance.random() < source.loss:
                continue
            targets = [known[to]] if to in known else [port for port in ports if port is not source]
            for target in targets:
                heapq.heappush(waiting, (time.monotonic() + source.delay, next(numbers), target, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(waiting)
            if not target.cut:
                with suppress(OSError):  # its queue is full, or it is not up: the frame is lost, as in any switch
                    os.write(target.device, frame)


if __name__ == "__main__":
    links = [Port(open_link(namespace)) for namespace in sys.argv[1:]]
    print(flush=True)
    run(links)
