"""Choosing an engine: what is missing or does not go together is one line."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale.config import Config, load_config
from w2vscale.engine import build_engine
from w2vscale.engine.activation_checkpointing import recompute_activations
from w2vscale.errors import UserError
from w2vscale.objectives.criterion import PretrainingCriterion
from w2vscale.training.loop import train
from w2vscale.training.run import empty_model


def settings(*overrides: str) -> Config:
    return load_config("base", [*MICRO_RUN, *overrides])


def test_deepspeed_that_is_not_installed_is_named_with_its_extra(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what Python keeps for a module that cannot be imported
    with pytest.raises(UserError, match=r"engine\.name=deepspeed: .* pip install 'w2vscale\[deepspeed\]'$") as caught:
        train(settings(f"data.train={small_corpus.train}", "engine.name=deepspeed"), tmp_path / "exp")
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()
    config = settings(f"data.train={small_corpus.train}", "engine.name=fsdp", "trainer.updates=1",
                      "schedule.warmup_updates=1")  # fmt: skip
    assert train(config, tmp_path / "exp") == 0
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.offload=true"], "offload=true is for name=fsdp, not name=ddp"),
        (["engine.name=deepspeed", "engine.offload=true"], "choose deepspeed_config=zero2_offload"),
        (["engine.shard_size=2"], "shard_size=2 is for name=fsdp, not name=ddp"),
        (["engine.name=horovod"], "engine.name='horovod'"),
    ],
)
def test_settings_of_another_engine_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "every", "recomputed"), [("none", 2, []), ("selective", 2, [0, 2]), ("full", 2, [0, 1, 2])]
)
def test_activation_checkpointing_takes_the_chosen_blocks(kind: str, every: int, recomputed: list[int]) -> None:
    config = settings(f"engine.activation_checkpointing={kind}", f"engine.activation_checkpointing_every={every}")
    model = empty_model(config)
    recompute_activations(model, config.engine)
    changed = [index for index, block in enumerate(model.encoder.transformer.blocks) if "forward" in vars(block)]
    assert changed == recomputed
    assert ("forward" in vars(model.encoder.feature_encoder)) is (kind != "none")


def test_cudnn_attention_is_off_on_gpus() -> None:
    """It builds a plan for each new shape. Without a GPU the engine fails later, when it asks for memory."""
    config = settings()
    torch.backends.cuda.enable_cudnn_sdp(True)
    with suppress(AssertionError, RuntimeError):
        build_engine(empty_model(config), PretrainingCriterion(config.model, seed=0), config, torch.device("cuda"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
