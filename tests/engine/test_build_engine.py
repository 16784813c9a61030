"""Choosing an engine: what is missing or does not go together is one line."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.commands import command
from tests.helpers.micro import MICRO_RUN
from w2vscale.config import Config, load_config
from w2vscale.engine.deepspeed.config import environment_for, import_deepspeed
from w2vscale.errors import UserError
from w2vscale.training.train import train


def settings(*overrides: str) -> Config:
    return load_config("base", [*MICRO_RUN, *overrides])


def test_deepspeed_that_is_not_installed_is_named_with_its_extra(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(os.environ)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what Python keeps for a module that cannot be imported
    with pytest.raises(UserError, match=r"engine\.name=deepspeed: .* pip install 'w2vscale\[deepspeed\]'$") as caught:
        train(settings(f"data.train={small_corpus.train}", "engine.name=deepspeed"), tmp_path / "exp")
    assert "\n" not in str(caught.value)
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized()
    config = settings(f"data.train={small_corpus.train}", "engine.name=fsdp", "trainer.updates=1",
                      "schedule.warmup_updates=1")  # fmt: skip
    assert train(config, tmp_path / "exp") == 0
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("function", ["validate_zero", "make_adamw"])
def test_a_deepspeed_engine_that_cannot_be_built_leaves_the_environment_as_it_was(
    function: str, small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_deepspeed(torch.device("cpu"))
    from w2vscale.engine.deepspeed import engine

    def refuse(*arguments: object) -> None:
        raise UserError("refused")

    monkeypatch.setattr(engine, function, refuse)
    environment = dict(os.environ)
    with pytest.raises(UserError, match="refused"):
        train(settings(f"data.train={small_corpus.train}", "engine.name=deepspeed"), tmp_path / "exp")
    assert dict(os.environ) == environment


@pytest.mark.parametrize(
    ("device", "before", "inside"),
    [
        ("cuda:0", {"LOCAL_RANK": "3"}, {"LOCAL_RANK": "0"}),  # a process that sees one GPU
        ("cuda:3", {}, {"LOCAL_RANK": "3"}),
        ("cpu", {"LOCAL_RANK": "3"}, {"LOCAL_RANK": "3", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1"}),
        ("cpu", {"LOCAL_WORLD_SIZE": "2"}, {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}),
    ],
)
def test_deepspeed_is_told_the_device(
    device: str, before: dict[str, str], inside: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "DS_ACCELERATOR", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    everything = dict(os.environ)
    with environment_for(torch.device(device)):
        assert dict(os.environ) == everything | inside
    assert dict(os.environ) == everything


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.offload=true"], "offload=true is for name=fsdp, not name=ddp"),
        (["engine.name=deepspeed", "engine.offload=true"], "choose deepspeed_config=zero2_offload"),
        (["engine.shard_size=2"], "shard_size=2 is for name=fsdp, not name=ddp"),
        (["engine.shard_size=node"], "shard_size=node is for name=fsdp, not name=ddp"),
        (["engine={name: fsdp, shard_size: 0}"], "engine.shard_size: 0 must be node or a whole number of at least 1"),
        (["engine={name: fsdp, shard_size: host}"], "host must be node or a whole number of at least 1"),
        (["engine.name=horovod"], "engine.name='horovod'"),
    ],
)
def test_settings_of_another_engine_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_importing_deepspeed_starts_no_compiler_and_makes_no_folder() -> None:
    """A kill meanwhile would leave the folder behind."""
    script = """
import sys

import torch

from w2vscale.engine.deepspeed.config import import_deepspeed

seen = []

def note(event, arguments):
    if event in ("subprocess.Popen", "tempfile.mkdtemp") and arguments[0] != "uname":  # MLflow asks for the platform
        seen.append(event)

sys.addaudithook(note)
import_deepspeed(torch.device("cpu"))
print(seen)
"""
    done = command(script=script)
    assert done.stdout.splitlines()[-1] == "[]", done
