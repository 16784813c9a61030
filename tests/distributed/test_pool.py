"""What the ranks of other tests do when one of them dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.pool import Pool

pytestmark = pytest.mark.distributed


def die_once(before: str, number: int) -> float:
    """Rank 1 dies of a signal the first time; the others wait for it."""
    if dist.get_rank() == 1 and not Path(before).exists():
        Path(before).touch()
        os.kill(os.getpid(), number)
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return float(ones)


def test_a_crash_is_shown_and_the_function_runs_again(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"(?s)die_once runs a second time.*-11.*Segmentation fault.*in die_once"):
        assert pool(2).run(die_once, str(tmp_path / "before"), signal.SIGSEGV) == [2.0, 2.0]
    assert pool(2).run(die_once, str(tmp_path / "before"), signal.SIGSEGV) == [2.0, 2.0]


def test_a_rank_that_is_killed_is_an_error(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="-9"):
        pool(2).run(die_once, str(tmp_path / "before"), signal.SIGKILL)
