"""Memory that a tensor left is there for the next one, unless the user has settings of the C library's own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from w2vscale.engine.host_memory import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 << 20)  # 40 MB: from 32 on glibc gives back what is freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(30)))
"""
OF_OTHERS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def faults(**environment: str) -> list[int]:
    """Page faults of thirty tensors, one after another. Some small thing behind a freed tensor may spoil the place for
    the next few, which need a little more for their alignment."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(OF_OTHERS)}
    own |= {"THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=own | environment, capture_output=True, text=True, timeout=120, check=True
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_use_again_what_others_have_left() -> None:
    first, *later = faults()
    if min(later) > first / 10 and min(keeping := faults(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))) > 50:
        pytest.skip(f"glibc's own variables do not keep memory here either: {keeping} page faults")
    assert first > 50 and min(later) < first / 10
    assert min(faults(MALLOC_ARENA_MAX="2")) > 50
