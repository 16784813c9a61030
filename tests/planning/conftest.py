"""Models that several tests of planning share, since each takes seconds to count."""

from __future__ import annotations

import pytest

from w2vscale.objectives import load
from w2vscale.planning.work import Model, model_of


@pytest.fixture(scope="session")
def base() -> Model:
    """The preset `base`, for a GPU."""
    return model_of("base", load("base")[0])


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The preset `tiny`, for a CPU."""
    return model_of("tiny", load("tiny")[0], device="cpu")
