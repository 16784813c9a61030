"""Types of what tests/conftest.py gives."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.process import BaseProcess

Started = Callable[[], list[BaseProcess]]
"""The processes that a test itself has started and that still run."""
