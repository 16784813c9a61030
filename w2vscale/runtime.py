"""All process-wide state: allocator, garbage collection, warnings and signals.

Only the command line sets it up; importing or calling the library never does.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to finish its update, save and exit."""

ONE_REQUEST_SECONDS = 2.0
"""Signals within this time count as one request: a scheduler may signal the ranks directly and through the launcher."""

DEBUG = "W2VSCALE_DEBUG"
"""Set if errors show their traceback. An environment variable, so that launched processes inherit it."""

FULL_COLLECTIONS = 10  # default of Python for the third threshold of garbage collection
NEVER = 2**31 - 1

COMPILED_VARIANTS = 64
"""Maximum variants of a compiled function: with or without padding, gradients and dropout, one utterance or more."""

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def enter(*, debug: bool = False) -> None:
    """Set up the process of a command: silence the logs of libraries and, unless on a terminal, their progress bars."""
    if debug:
        os.environ[DEBUG] = "1"
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # DeepSpeed logs at import, on every rank.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by deprecated names, on every rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # The warning is about in-place changes of a view, but the model changes no tensor in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


@contextmanager
def training(*, compile: bool | Literal["auto"] = False) -> Iterator[StopRequest]:
    """Set up the process of a training run: memory, kernels, stop signals. `compile`: the setting `engine.compile`."""
    prepare_process(compile=compile)
    with StopRequest() as stop:
        yield stop


def prepare_process(*, compile: bool | Literal["auto"] = False) -> None:
    """Set up memory and kernels for training, for as long as the process lives. `compile`: as in `training`."""
    import torch

    if on_gpu := torch.cuda.is_available():
        # Forwards differ in shape, and their memory would otherwise break into pieces that fit none of the next ones.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        # From torch 2.11 on, attention on Hopper GPUs prefers cuDNN, which builds a new plan for each batch shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        keep_freed_memory()
    if compile is True or (compile == "auto" and on_gpu):
        import torch._dynamo.config as dynamo

        dynamo.recompile_limit = COMPILED_VARIANTS
        # This would split graphs at the bucket boundaries of DDP, which only helps if a whole model is compiled.
        dynamo.optimize_ddp = False


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensor.

    By default glibc returns the memory of large tensors to the system at once, and gets zero-filled pages for the next
    one. This takes up to a fifth of a training step on a CPU (docs/performance.md). Does nothing without glibc, or if
    its own variables (`MALLOC_…`, `GLIBC_TUNABLES`) are set.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def collected_between_steps() -> Iterator[None]:
    """Turn off automatic full garbage collections, and exclude all existing objects from collection.

    The training loop calls `gc.collect()` between steps instead, because a full collection takes a tenth of a second
    and in the middle of a step would make all other ranks wait. Collections of young objects take almost no time and
    stay automatic.
    """
    young, middle, old = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(young, middle, NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)
        gc.unfreeze()


class StopRequest:
    """While active, records the first stop signal. A second one raises KeyboardInterrupt.

    Signals within `ONE_REQUEST_SECONDS` of the first are ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP; leave it ignored
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif now - self._received_at > ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt
