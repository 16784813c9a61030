"""Parameters of a test that are for the long tier only."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long(*values: object) -> Any:
    """A set of parameters for the long tier."""
    return pytest.param(*values, marks=pytest.mark.long)


def long_except(quick: Collection[str], names: Iterable[str]) -> list[Any]:
    """`names` as parameters; all but the `quick` ones are for the long tier."""
    return [name if name in quick else long(name) for name in names]
