"""Updates of `tiny` on one of several hosts, timed. Part of scale_model.py --validate.

    python -m tools.scaling.point RESULT.json --number 0 --count 2 --address 10.77.0.1 --engine ddp …

Each host has two such processes. One of them trains alone (--alone): what an update costs without links, while as many
processes share the processor. The other one trains one model with all hosts. They take turns, update by update, so that
whatever else the machine does slows both down. All hosts start each update at the same moment.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from tools.bench.contenders import LR, Work
from tools.bench.running import Setup, build
from tools.bench.script import run_script
from w2vscale.config import load_config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import process_group
from w2vscale.planning.traffic import ENGINES

PORT = 29400
WARM_UP = 2
TIMEOUT = timedelta(minutes=5)


def main(
    result: Annotated[Path, typer.Argument(help="Output: times and sent bytes of each update, by engine and speed.")],
    number: Annotated[int, typer.Option(min=0, help="Number of this host.")],
    count: Annotated[int, typer.Option(min=1, help="Number of hosts.")],
    address: Annotated[str, typer.Option(help="Address of host 0.")],
    engine: Annotated[list[str], typer.Option(help="Engine; repeatable.")],
    speed: Annotated[list[float] | None, typer.Option(help="Megabits per second; repeatable.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Train apart from the other hosts.")] = False,
    updates: Annotated[int, typer.Option(min=1, help="Timed updates per engine and speed.")] = 5,
    forwards: Annotated[int, typer.Option(min=1, help="Forwards of an update.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.5, help="Audio of a forward.")] = 8.0,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...")] = None,
) -> None:
    """Time updates."""
    torch.set_num_threads(1)
    serving = alone and number == 0
    store = dist.TCPStore(address, PORT, is_master=serving, wait_for_workers=False, timeout=TIMEOUT)
    if not alone:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(PORT + 1)}
    everyone = Everyone(store, count * (2 if speed else 1))
    figures: dict[str, list[dict[str, float]]] = {}
    with process_group(needed=True) as (_, device):
        for name in engine:
            config = load_config("tiny", [*(settings or []), f"engine={json.dumps(ENGINES[name])}"])
            setup = build(config, device)
            window = [Work(config, 1, seconds).batch(forwards * number + place) for place in range(forwards)]
            for update in range(WARM_UP + updates):
                for turn in (None, *(speed or [])):
                    everyone.meet()
                    if not alone and turn is not None and number == 0:
                        ask(result, turn)
                    everyone.meet()
                    if alone == (turn is None):
                        row = timed(setup, window, update)
                        if update >= WARM_UP:
                            figures.setdefault(f"{name} {turn or 0:g}", []).append(row)
            everyone.meet()
            setup.engine.close()
    result.write_text(json.dumps(figures))
    everyone.meet()  # host 0 serves the store


def timed(setup: Setup, window: list[MicroBatch], update: int) -> dict[str, float]:
    """Seconds and sent bytes of one update."""
    before, began = sent(), time.perf_counter()
    setup.window(window, float(sum(batch.weight for batch in window)), update=update)
    computed = time.perf_counter()
    setup.step(LR, update=update)
    ended = time.perf_counter()
    return {"window": computed - began, "step": ended - computed, "sent": sent() - before}


@dataclass
class Everyone:
    """All processes of all hosts."""

    store: dist.TCPStore
    count: int
    met: int = 0

    def meet(self) -> None:
        """Wait until all are here."""
        self.met += 1
        place = f"meeting {self.met}"
        if self.store.add(place, 1) == self.count:
            self.store.set(f"{place}: all are here", "")
        else:
            self.store.wait([f"{place}: all are here"], TIMEOUT)


def ask(result: Path, speed: float) -> None:
    """Wait until the process that started this one has limited all links to `speed`."""
    asked, granted = result.with_suffix(".asked"), result.with_suffix(".granted")
    asked.with_suffix(".new").write_text(str(speed))
    asked.with_suffix(".new").replace(asked)
    while not granted.exists():
        time.sleep(0.005)
    granted.unlink()


def sent() -> int:
    """Bytes that this host has sent, with all headers; 0 where it has no link."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


if __name__ == "__main__":
    run_script(main)
