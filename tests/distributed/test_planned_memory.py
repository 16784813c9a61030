"""The memory that is planned for an engine is what PyTorch allocates (all engines: tests/tools/test_bench.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.helpers.pool import Pool
from tools.bench.engine_memory import measured, measured_run

pytestmark = pytest.mark.distributed


def test_the_peak_of_fsdp_is_predicted_within_a_tenth(pool: Callable[[int], Pool]) -> None:
    settings = ["engine.name=fsdp", "model.layers=2", "optim.ema_decay=0.999"]
    config = measured_run("tiny", settings, ranks=2, utterances=2, seconds=4.0)
    for figures in pool(2).run(measured, config, torch.device("cpu")):
        assert figures.predicted == pytest.approx(figures.peak, rel=0.1)
        held = [figures.held[kind] for kind in ("parameters", "gradients", "moments")]
        assert figures.peak > sum(held) > 16 * figures.parameters / 2  # a rank has half of it
        average = figures.held["average"]
        assert average == pytest.approx(4 * figures.parameters / 2, rel=0.01)
        assert average == pytest.approx(figures.predicted_held["average"], rel=0.01)
