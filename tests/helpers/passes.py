"""Passes with fake tensors are pure functions, and take most of the time of a plan: tests run each of them once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from w2vscale.config import Config
from w2vscale.planning import timeline, work

SETTINGS: Any = {
    **dict.fromkeys(("model", "regularization", "objective", "precision"), True),
    "engine": {"activation_checkpointing", "activation_checkpointing_every"},
    "data": {"max_seconds"},
}
"""What a pass depends on, beside its other arguments."""

_results: dict[tuple[object, ...], Any] = {}


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(config: Config, **others: Any) -> Any:
        key = (function.__name__, config.model_dump_json(include=SETTINGS), *sorted(others.items()))
        if key not in _results:
            _results[key] = function(config, **others)
        return _results[key]

    return call


@contextmanager
def passes_run_once() -> Iterator[None]:
    """Inside, a pass that was run before is not run again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "fake_pass", _once(timeline.fake_pass))
        patch.setattr(work, "counted_flops", _once(work.counted_flops))
        yield
