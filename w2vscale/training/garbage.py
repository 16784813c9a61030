"""Python's garbage collector, at moments of our choice: a rank that it stops in a step has all others wait."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_between_steps() -> Iterator[None]:
    """No collection but by `collect`; what exists now (libraries, the model) is never looked at again."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect(*, thoroughly: bool = False) -> None:
    """Free what refers to itself and has come about lately, or at any time."""
    gc.collect(2 if thoroughly else 1)
