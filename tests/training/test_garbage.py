"""The garbage collector looks through what is old between updates alone, and as before afterwards."""

from __future__ import annotations

import gc
import multiprocessing
import weakref
from multiprocessing.connection import Connection

from w2vscale.data.loading import _prepare_loader_process
from w2vscale.training.garbage import NEVER, collected_between_steps


class Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_there_is_not_looked_at_and_what_is_new_is() -> None:
    thresholds = gc.get_threshold()
    older = Knot()
    with collected_between_steps():
        assert gc.get_freeze_count() > 1000 and gc.get_threshold() == (*thresholds[:2], NEVER)
        lasting, gone = weakref.ref(older), weakref.ref(Knot())
        del older
        gc.collect()
        assert gone() is None and lasting() is not None
    assert gc.get_threshold() == thresholds and gc.get_freeze_count() == 0
    gc.collect()
    assert lasting() is None


def _tell_thresholds(connection: Connection) -> None:
    _prepare_loader_process(0)
    connection.send(gc.get_threshold())


def test_loader_processes_collect_as_ever() -> None:
    thresholds = gc.get_threshold()
    ours, theirs = multiprocessing.Pipe()
    with collected_between_steps():
        process = multiprocessing.get_context("fork").Process(target=_tell_thresholds, args=(theirs,))
        process.start()
        assert ours.poll(30) and ours.recv() == thresholds
        process.join()
