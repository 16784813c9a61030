"""Continued pretraining from a checkpoint: trainer.init_from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.continued import transformers_loss
from tests.helpers.exported import random_model, save_model
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.config import Config, load_config
from w2vscale.errors import UserError
from w2vscale.files import read_metrics
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.objectives import build_objective
from w2vscale.training.run import open_training_set
from w2vscale.training.train import train

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("source")
    config = load_config("base", MICRO_RUN)
    save_model(folder, config, random_model(config, seed=2).state_dict(), TrainState(data="960.0 hours"))
    return folder


def settings(corpus: SmallCorpus, source: Path, *overrides: str) -> Config:
    return load_config("base", [*MICRO_RUN, f"data.train={corpus.train}", f"trainer.init_from={source}", *overrides])


@pytest.mark.parametrize("engine", ["engine.name=ddp", "engine={name: deepspeed, deepspeed_config: zero2}"])
def test_the_first_loss_is_transformers_loss_of_the_same_batch(
    small_corpus: SmallCorpus, source: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed")
    config = settings(
        small_corpus, source, "trainer.updates=1", "schedule.warmup_updates=1", "regularization.layerdrop=0",
        "regularization.dropout=0", "regularization.attention_dropout=0", "regularization.input_dropout=0",
        "objective.feature_dropout=0", "data.min_seconds=2.0", engine,
    )  # fmt: skip
    assert train(config, tmp_path / "exp") == 0
    (record,) = read_metrics(tmp_path / "exp" / "metrics.jsonl", "train")
    export_checkpoint(source, tmp_path / "hf", form="huggingface")
    objective = build_objective(config)
    training_set = open_training_set(config, objective)
    (window,) = training_set.windows(range(1), micro_batches=config.batch.micro_batches, rank=0, world_size=1)
    theirs = transformers_loss(tmp_path / "hf", window, config)
    mine = record["contrastive"] + objective.settings.diversity_weight * record["diversity"]
    assert mine == pytest.approx(theirs, rel=1e-5)
    said = " ".join(capsys.readouterr().out.split())
    assert "tensors of loaded missing other shape not used" in said
    assert "encoder.feature_encoder 9 0 0 0" in said and "quantizer 3 0 0 0" in said


def test_other_shapes_and_settings_are_errors_unless_named(
    small_corpus: SmallCorpus, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for override, name in (
        ("model.ffn_dim=32", "model.ffn_dim is 64 there and 32 here"),
        ("model.heads=2", "model.heads is 4 there and 2 here"),
        ("model.normalize_waveform=true", "model.normalize_waveform is False there and True here"),
    ):
        with pytest.raises(UserError, match=f"{name};.* or name what may differ in trainer.init_allow"):
            train(settings(small_corpus, source, override), tmp_path / "no")
    allowed = settings(
        small_corpus, source, "objective.codebook_entries=12", "trainer.updates=1", "schedule.warmup_updates=1",
        "trainer.init_allow=[codebook_entries,quantizer,nosuch]",
    )  # fmt: skip
    capsys.readouterr()
    assert train(allowed, tmp_path / "exp") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "quantizer 0 0 3 0" in said
    assert "warning: trainer.init_allow: nosuch matches nothing" in said
    assert "newly initialised: quantizer.codevectors is [2, 16, 8] there and [2, 12, 8] here" in said
    with pytest.raises(UserError, match=r"quantizer\.\S+ is \[.*\] there and \[.*\] here"):
        train(
            settings(small_corpus, source, "objective.codebook_entries=12", "trainer.init_allow=[codebook_entries]"),
            tmp_path / "other",
        )


def test_a_run_that_was_begun_continues_instead(small_corpus: SmallCorpus, source: Path, tmp_path: Path) -> None:
    first = ("trainer.updates=2", "schedule.warmup_updates=1")
    train(settings(small_corpus, source, *first), tmp_path)
    before = whole(open_checkpoint(tmp_path).model_tensors())
    train(settings(small_corpus, tmp_path / "gone", *first), tmp_path)
    assert all(torch.equal(before[n], t) for n, t in whole(open_checkpoint(tmp_path).model_tensors()).items())


def test_an_import_is_no_run_to_continue(small_corpus: SmallCorpus, source: Path) -> None:
    config = load_config("base", [*MICRO_RUN, f"data.train={small_corpus.train}"])
    with pytest.raises(UserError, match=r"from its 1 checkpoint; start one .* trainer\.init_from=.*, in another --exp"):
        train(config, source)
