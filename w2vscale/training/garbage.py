"""Python's garbage collector, at moments of our choice: a rank that it stops in a step has all others wait."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEVER = 2**31 - 1


@contextmanager
def collected_between_steps() -> Iterator[None]:
    """What has grown old is looked through by `gc.collect()` alone, and what exists now (libraries, the model) never.

    A full collection takes a tenth of a second; those of young objects, which go on, next to nothing.
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
