"""What every engine does to a model before it lays it out: recompute, compile, shard."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import EngineConfig, load_config
from w2vscale.engine.transforms import transform
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective
from w2vscale.training.run import empty_model


def model_and_engine(*overrides: str) -> tuple[Any, EngineConfig]:
    config = load_config("base", [*MICRO_MODEL, *overrides])
    return empty_model(build_objective(config)), config.engine


@pytest.mark.parametrize(
    ("kind", "every", "recomputed"),
    [("none", 2, []), ("features", 2, []), ("selective", 2, [0, 2]), ("full", 2, [0, 1, 2])],
)
def test_activation_checkpointing_takes_the_chosen_blocks(kind: str, every: int, recomputed: list[int]) -> None:
    model, engine = model_and_engine(
        f"engine.activation_checkpointing={kind}", f"engine.activation_checkpointing_every={every}"
    )
    transform(model, engine)
    changed = [index for index, block in enumerate(model.encoder.transformer.blocks) if "forward" in vars(block)]
    assert changed == recomputed
    assert ("forward" in vars(model.encoder.feature_encoder)) is (kind != "none")


def test_sharding_comes_last() -> None:
    """Every block is compiled by then."""
    model, engine = model_and_engine("engine.compile=true")
    seen: list[bool] = []
    transform(model, engine, lambda model: seen.extend("forward" in vars(b) for b in model.encoder.transformer.blocks))
    assert seen == [True] * 3


def test_compiled_blocks_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/g++")
    model, engine = model_and_engine("engine.compile=true")
    with pytest.raises(UserError, match=r"engine\.compile=true: .* /no/such/g\+\+ \(CXX\) was not found"):
        transform(model, engine)
