"""What the ranks of a pool do with an engine that keeps a moving average of the weights."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tests.helpers.engines import set_up
from tests.helpers.micro import MICRO_RUN
from tests.helpers.semantics import whole_state
from w2vscale.config import load_config


class Exchange(NamedTuple):
    """The loss of one micro-batch with different weights, and what a validation of the averaged weights leaves."""

    before: float
    averaged: float
    after: float
    imported: float  # with the averaged weights, imported as those of another model
    unchanged: bool  # whether the state after the block is that before, bit for bit
    interrupted: bool  # the same where the block was left by an error


def exchange(corpus: str, overrides: tuple[str, ...]) -> Exchange:
    """Take three updates, and evaluate the averaged weights."""
    setup = set_up(load_config("base", [*MICRO_RUN, f"data.train={corpus}", *overrides]))
    engine, batch = setup.engine, setup.training_set.largest()
    for update in range(3):
        setup.window([batch], 100.0, update=update)
        setup.step(1e-2)
    state = whole_state(setup)

    def loss() -> float:
        return float(setup.evaluate(batch).total)

    def unchanged() -> bool:
        return all(torch.equal(tensor, state[name]) for name, tensor in whole_state(setup).items())

    before = loss()
    with engine.averaged():
        averaged = loss()
    found = [unchanged()]
    after = loss()
    try:
        with engine.averaged():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        found.append(unchanged())
    values = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    values |= {name.removeprefix("ema."): tensor for name, tensor in state.items() if name.startswith("ema.")}
    engine.import_values(values.items())
    imported = loss()
    engine.close()
    return Exchange(before, averaged, after, imported, *found)
