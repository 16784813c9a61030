"""Ctrl-C on the command line: at any moment one line, exit code 130 and no traceback.

Only the command line sets it up, before its other imports; importing or calling the library never does.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

EXIT_CODE = 128 + signal.SIGINT
IMPORTING = "<frozen importlib._bootstrap>"
SHOW_CURSOR = "\r\x1b[K\x1b[?25h"  # also clears the line, which may have a part of a progress bar

_process = 0  # the process whose Ctrl-C is handled here
_asked = False


def handle() -> None:
    """Handle Ctrl-C in this process, unless it is ignored as in a background job of a shell.

    The first one raises KeyboardInterrupt, so that files and processes are cleaned up; the second one ends the process
    at once. So does one during an import: extension modules and libraries replace or lose an exception there.
    """
    global _process, _asked
    _process, _asked = os.getpid(), False
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _leave_if_interrupted
    # A launcher starts its ranks with the signal blocked, so that it cannot come before this.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def asked() -> bool:
    """Whether Ctrl-C has come."""
    return _asked


def note() -> None:
    """Note a Ctrl-C that another handler has received, and that ends the process if it is a command."""
    global _asked
    _asked = _process == os.getpid()


def leave() -> NoReturn:
    """Print the line and end the process, without waiting for threads or running anything more."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # one line for all ranks
        os.write(2, f"{SHOW_CURSOR if os.isatty(2) else ''}interrupted\n".encode())
    os._exit(EXIT_CODE)


def end() -> None:
    """From here on, Ctrl-C ends the process silently: nothing is left but the exit of the interpreter."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _process:  # a forked process that has not chosen its own action yet
        os._exit(EXIT_CODE)
    if _asked or _is_importing(frame):
        leave()
    note()
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False


def _leave_if_interrupted(problem: sys.UnraisableHookArgs) -> None:
    """Python reports errors that it cannot raise, such as those in destructors, and goes on."""
    if issubclass(problem.exc_type, KeyboardInterrupt):
        leave()
    sys.__unraisablehook__(problem)
