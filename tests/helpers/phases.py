"""Phases of a bench that end in every way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from tools.bench.phases.measuring import Machine, Rows


def good(machine: Machine) -> Rows:
    yield "device", machine.device_name
    yield "tiny", machine.tiny


def fails(machine: Machine) -> Rows:
    yield "first", 1.0
    print("about to fail")
    raise RuntimeError("no such kernel\nand a second line")


def hangs(machine: Machine) -> Rows:
    """With a child that would live on."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield "child", child.pid
    time.sleep(600)


def talks_for_ever(machine: Machine) -> Rows:
    for number in range(10**6):
        yield f"row {number % 3}", number
        time.sleep(0.01)


def dies(machine: Machine) -> Rows:
    yield "first", 1.0
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
