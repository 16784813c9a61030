"""The garbage collector works between updates, and as before afterwards."""

from __future__ import annotations

import gc
import weakref

from w2vscale.training.garbage import collect, collected_between_steps


class Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_what_refers_to_itself_stays_until_it_is_asked_for() -> None:
    older = Knot()
    with collected_between_steps():
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        gone = weakref.ref(Knot())
        for _ in range(2000):
            Knot()
        assert gone() is not None
        collect()
        assert gone() is None
        lasting = weakref.ref(older)
        del older
        collect(thoroughly=True)
        assert lasting() is not None  # it was there when training began
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.collect()
    assert lasting() is None
