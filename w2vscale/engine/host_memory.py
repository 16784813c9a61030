"""How the C library keeps the memory that tensors on a CPU come and go in."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
NEVER = -1


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensor. Does nothing where the C library is not glibc, or where its own variables
    (`MALLOC_…`, `GLIBC_TUNABLES`) are set.

    By default glibc gives large tensors back to the system at once, and gets each anew, page by page and filled with
    zeros: up to a fifth of a step on a CPU (docs/performance.md).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
