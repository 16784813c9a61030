"""Passes with fake tensors are pure functions, and take most of the time of a plan: tests run each of them once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

from w2vscale.config import Config
from w2vscale.planning import timeline
from w2vscale.planning.fake_pass import Pass, fake_pass

SECTIONS = {"model", "regularization", "objective", "data", "engine", "precision"}
_configs: dict[str, Config] = {}


@cache
def _run(key: str, others: tuple[tuple[str, Any], ...]) -> Pass:
    return fake_pass(_configs[key], **dict(others))


def _once(config: Config, **others: Any) -> Pass:
    key = config.model_dump_json(include=SECTIONS)
    _configs.setdefault(key, config)
    return _run(key, tuple(sorted(others.items())))


@contextmanager
def passes_run_once() -> Iterator[None]:
    """Inside, a pass that was run before is not run again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "fake_pass", _once)
        yield
