"""All process-wide state: allocator, garbage collection, warnings and signals.

Only the command line sets it up; importing or calling the library never does.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import logging
import multiprocessing.process
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from w2vscale import interrupts

STARTED = time.monotonic()
"""When this process began, nearly: the command line imports this module first."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to finish its update, save and exit."""

SOCKETS = "w2vscale-"
"""What the names of folders for sockets begin with, in the folder for temporary files."""

ONE_REQUEST_SECONDS = 2.0
"""Signals within this time count as one request: a scheduler may signal the ranks directly and through the launcher."""

DEBUG = "W2VSCALE_DEBUG"
"""Set if errors show their traceback. An environment variable, so that launched processes inherit it."""

LAUNCHER = "W2VSCALE_LAUNCHER"
"""Set for the processes that a launcher starts: its process id."""

FULL_COLLECTIONS = 10  # default of Python for the third threshold of garbage collection
NEVER = 2**31 - 1

COMPILED_VARIANTS = 64
"""Maximum variants of a compiled function: with or without padding, gradients and dropout, one utterance or more."""

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
PR_SET_PDEATHSIG = 1


def enter(*, debug: bool = False, launched: bool = False) -> None:
    """Set up the process of a command: silence the logs of libraries and, unless on a terminal, their progress bars.

    If it was `launched` by another process, which torchrun and our own launcher also say in the environment, it ends
    with that process.
    """
    if debug:
        os.environ[DEBUG] = "1"
    threading.excepthook = _show_error_of_thread
    if (launcher := os.environ.pop(LAUNCHER, None)) is not None:
        end_with_parent()
        if os.getppid() != int(launcher):  # it has ended already
            os._exit(1)
    elif launched or "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        end_with_parent()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # The profiler writes its stages to stderr; 6 is above all levels of its library.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # DeepSpeed logs at import, on every rank.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by deprecated names, on every rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # The warning is about in-place changes of a view, but the model changes no tensor in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


def _show_error_of_thread(found: threading.ExceptHookArgs) -> None:
    """Show an error that ends a thread, unless the thread keeps it for the caller, as those of TensorBoard do."""
    if getattr(found.thread, "exception", None) is not found.exc_value:
        threading.__excepthook__(found)


def hide_failed_connections() -> None:
    """Hide the stack traces that PyTorch logs for connections that fail. Call it before PyTorch is imported."""
    if DEBUG not in os.environ:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"


def end_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends. Does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def training(*, compile: bool | Literal["auto"] = False) -> Iterator[StopRequest]:
    """Set up the process of a training run: memory, kernels, stop signals. `compile`: the setting `engine.compile`."""
    prepare_process(compile=compile)
    with StopRequest() as stop:
        yield stop


@contextmanager
def socket_folder() -> Iterator[None]:
    """Have loader processes put their sockets into a folder that is deleted at the end of the block.

    If this process is killed, the next one deletes it. (multiprocessing would leave one folder per killed loader.)
    """
    configuration = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if "tempdir" in configuration:  # multiprocessing has made its own
        yield
        return
    delete_left_sockets()
    folder, lock = _locked_folder()
    configuration["tempdir"] = str(folder)
    try:
        yield
    finally:
        del configuration["tempdir"]
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def delete_left_sockets() -> None:
    """Delete the folders that `socket_folder` made in processes that were killed."""
    for folder in _place_of_sockets().glob(f"{SOCKETS}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the process that made it lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _place_of_sockets() -> Path:
    place = Path(tempfile.gettempdir())
    return place if len(str(place)) < 60 else Path("/tmp")  # the path of a socket has at most 107 bytes


def _locked_folder() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SOCKETS, dir=_place_of_sockets()))
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if (folder / "lock").exists():
            return folder, lock
        os.close(lock)  # another process took it for one that was left


def prepare_process(*, compile: bool | Literal["auto"] = False) -> None:
    """Set up memory and kernels for training, for as long as the process lives. `compile`: as in `training`."""
    import torch

    if on_gpu := torch.cuda.is_available():
        # Forwards differ in shape, and their memory would otherwise break into pieces that fit none of the next ones.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which the newer one would override
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


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """In the block, SIGTERM and SIGHUP raise SystemExit, so that it can clean up as after Ctrl-C."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    previous = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP; leave it ignored
            previous[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Interrupted(Exception):
    """A stop signal came while the process was waiting."""


class StopRequest:
    """While active, records the first stop signal. A second one raises KeyboardInterrupt.

    Signals within `ONE_REQUEST_SECONDS` of the first are ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._waiting = False
        self._arrived: tuple[signal.Signals, float] | None = None
        self._pipe: tuple[int, int] | None = None
        self._previous_wakeup = -1
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP; leave it ignored
                    self._previous[number] = signal.signal(number, self._handle)
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        return self

    def arrived(self) -> tuple[signal.Signals, float] | None:
        """Return the first stop signal that reached this process, and when another thread first saw it here.

        The main thread records a signal only when it runs Python code: not while it waits for other ranks.
        """
        if self._arrived is None and self._pipe is not None:
            with suppress(BlockingIOError):
                numbers = [number for number in os.read(self._pipe[0], 64) if number in STOP_SIGNALS]
                if numbers:
                    self._arrived = signal.Signals(numbers[0]), time.monotonic()
        return self._arrived

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            with suppress(OSError, ValueError):  # its owner, such as the event loop of a notebook, may have closed it
                signal.set_wakeup_fd(self._previous_wakeup)
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """In the block, a stop signal raises Interrupted, as does one that has come before."""
        self._waiting = True
        try:
            if self.received is not None:
                raise Interrupted
            yield
        finally:
            self._waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            if self._waiting:
                raise Interrupted
        elif now - self._received_at > ONE_REQUEST_SECONDS:
            interrupts.note()
            raise KeyboardInterrupt
