"""The memory that work takes beyond the page cache, in a process of its own or in a rank of a pool."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.helpers.checkpoints import expected_of_parameters
from tests.helpers.engines import set_up
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.expected import expected_of
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lazy import LazyReader
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, load_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.engine import rows as rows_module
from w2vscale.engine.rows import Rows
from w2vscale.optim.canonical import model_only

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of mallopt(3): larger blocks are memory mappings of their own


def anonymous() -> int:
    """Bytes of resident memory that are no pages of files (RssAnon in proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status has no RssAnon")


def peak_of(work: Callable[[], Any]) -> int:
    """The most anonymous memory during `work`, above what there was before. It is looked at every millisecond."""
    gc.collect()
    before = peak = anonymous()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return peak - before


def peaks_of_a_state(folder: str) -> dict[str, float]:
    """Bytes to save, read and start from a state, as a share of what this rank holds of it: 96 matrices of 1 MiB."""
    expected = expected_of_parameters({f"layer{number}": (512, 512) for number in range(32)})
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    rows = Rows(torch.device("cpu"))
    state = {name: rows.own(torch.ones(spec.shape)) for name, spec in expected.items()}
    held = 96 * MIB / ranks.world_size
    store = CheckpointStore(Path(folder), ranks, expected=expected)

    def read() -> None:
        for _ in rows.read(open_checkpoint(Path(folder), hashed=False), expected):
            pass

    def start() -> None:
        checkpoint = open_checkpoint(Path(folder), hashed=False)
        tensors = {name.removeprefix("model."): checkpoint.lazy(name) for name in model_only(expected)}
        for _ in rows.read(LazyReader(tensors), model_only(expected)):
            pass

    with patch.object(rows_module, "PART_BYTES", MIB):
        return {
            "save": peak_of(lambda: store.save(state, TrainState(update=1), "")) / held,
            "read": peak_of(read) / held,
            "start": peak_of(start) / held,
        }


def peaks_of_an_engine(corpus: str, folder: str, overrides: tuple[str, ...]) -> dict[bool, float]:
    """Bytes to export and save the state of an engine, as a share of what this rank holds of it.

    With and without `checkpoint.asynchronous`. Run it in new processes. No tensor of the model has 4 % of its state.
    """
    with suppress(AttributeError):  # another libc
        # By default, glibc keeps large blocks that are freed: they would hide a copy, and fragment the memory.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    settings = [*MICRO_RUN, f"data.train={corpus}", *overrides]
    large = ["model.dim=512", "model.ffn_dim=2048", "model.positional_kernel=16", "model.positional_groups=16"]
    _save_twice(load_config("base", settings), Path(folder) / "small")  # imports modules and starts threads
    return _save_twice(load_config("base", [*settings, *large]), Path(folder) / "large")


def _save_twice(config: Config, folder: Path) -> dict[bool, float]:
    setup = set_up(config)
    expected = expected_of(config)
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    held = sum(4 * math.prod(spec.shape) for spec in expected.values()) / ranks.world_size
    found: dict[bool, float] = {}
    for asynchronous in (False, True):
        store = CheckpointStore(folder, ranks, expected=expected, keep_last=2, asynchronous=asynchronous)

        def save(store: CheckpointStore = store) -> None:
            store.save(setup.engine.export_state(), TrainState(update=1 + store.asynchronous), "")
            store.wait()

        found[asynchronous] = peak_of(save) / held
    setup.engine.close()
    return found
