"""The arithmetic of the moving average, in one process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from w2vscale.optim import ema
from w2vscale.optim.adamw import allocate_state
from w2vscale.optim.ema import AVERAGE, exchange_average, start_average, update_average


def optimizer_of(*shapes: tuple[int, ...], average: bool = True) -> torch.optim.AdamW:
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters)
    allocate_state(optimizer, parameters, average=average)
    return optimizer


@pytest.mark.parametrize("decay", [0.25, 0.999, 0.99999])
def test_a_thousand_updates_are_those_of_float64(decay: float) -> None:
    optimizer = optimizer_of((50, 3))
    ((parameter, state),) = optimizer.state.items()
    start_average(optimizer)
    assert state[AVERAGE].equal(parameter)
    expected = parameter.detach().double()
    for _ in range(1000):
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        update_average(optimizer, torch.tensor(1.0), decay)
        expected = decay * expected + (1.0 - decay) * parameter.detach().double()
    assert float((state[AVERAGE] - expected).norm() / expected.norm()) < 3e-6
    assert not state[AVERAGE].equal(parameter)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_skipped_update_changes_no_bit(norm: float) -> None:
    optimizer = optimizer_of((50, 3))
    ((parameter, state),) = optimizer.state.items()
    before = state[AVERAGE].copy_(parameter * 3.0).clone()
    update_average(optimizer, torch.tensor(norm), 0.9)
    assert state[AVERAGE].equal(before)
    update_average(optimizer, torch.tensor(1e30), 0.9)
    assert not state[AVERAGE].equal(before)


def test_an_exchange_in_parts_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat tensors of ZeRO are exchanged in parts, since a copy of them would be one of all weights."""
    monkeypatch.setattr(ema, "PART", 4)
    optimizer = optimizer_of((), (11,), (3, 5))
    before = []
    for parameter, state in optimizer.state.items():
        state[AVERAGE].copy_(torch.randn_like(parameter))
        before.append((parameter.detach().clone(), state[AVERAGE].clone()))
    exchange_average(optimizer)
    for (parameter, state), (weights, average) in zip(optimizer.state.items(), before, strict=True):
        assert parameter.equal(average) and state[AVERAGE].equal(weights)


def test_without_an_average_there_is_nothing_to_do() -> None:
    optimizer = optimizer_of((4,), average=False)
    ((parameter, state),) = optimizer.state.items()
    before = parameter.detach().clone()
    start_average(optimizer)
    update_average(optimizer, torch.tensor(1.0), 0.0)
    exchange_average(optimizer)
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and parameter.equal(before)
