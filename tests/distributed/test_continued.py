"""Continued pretraining of models of other libraries, in two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.continued import transformers_loss
from tests.helpers.micro import MICRO_RUN
from tests.helpers.pool import Pool
from tests.helpers.tasks import rows_read_of, train_micro
from w2vscale.config import load_config
from w2vscale.files import read_metrics
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.interop.huggingface import huggingface_config, preprocessor_config
from w2vscale.interop.importing import import_checkpoint
from w2vscale.objectives import build_objective
from w2vscale.training.run import open_training_set

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.distributed

SETTINGS = (
    "trainer.updates=20", "regularization.layerdrop=0", "regularization.dropout=0",
    "regularization.attention_dropout=0", "regularization.input_dropout=0", "objective.feature_dropout=0",
    "data.min_seconds=2",
)  # fmt: skip
"""All utterances are equally long, because the GroupNorm of Transformers counts padding."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that Transformers has saved."""
    folder = tmp_path_factory.mktemp("theirs")
    config = load_config("base", [*MICRO_RUN, *SETTINGS])
    torch.manual_seed(4)
    settings = transformers.Wav2Vec2Config(**huggingface_config(config))
    transformers.Wav2Vec2ForPreTraining(settings).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(**preprocessor_config(config.model)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", ["engine.name=ddp", "engine={name: deepspeed, deepspeed_config: zero2}"])
def test_the_first_loss_is_transformers_and_the_run_learns(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, theirs: Path, tmp_path: Path, engine: str
) -> None:
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed")
    import_checkpoint(theirs, tmp_path / "in", form="huggingface")
    overrides = (*SETTINGS, f"trainer.init_from={tmp_path / 'in'}", engine)
    pool(2).run(train_micro, str(small_corpus.train), str(tmp_path / "exp"), overrides)
    assert_first_loss_is_transformers(theirs, small_corpus, tmp_path / "exp", overrides)


@pytest.mark.parametrize("engine", ["engine.name=fsdp", "engine={name: deepspeed, deepspeed_config: zero3}"])
def test_a_run_starts_from_a_file_of_fairseq2(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, theirs: Path, tmp_path: Path, engine: str
) -> None:
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed")
    import_checkpoint(theirs, tmp_path / "in")
    export_checkpoint(tmp_path / "in", tmp_path / "out", form="fairseq2")
    overrides = (*SETTINGS, f"trainer.init_from={tmp_path / 'out' / 'model.pt'}", engine)
    pool(2).run(train_micro, str(small_corpus.train), str(tmp_path / "exp"), overrides)
    assert_first_loss_is_transformers(theirs, small_corpus, tmp_path / "exp", overrides)


def test_each_rank_reads_its_rows_of_a_file_only(pool: Callable[[int], Pool], theirs: Path, tmp_path: Path) -> None:
    import_checkpoint(theirs, tmp_path / "in")
    export_checkpoint(tmp_path / "in", tmp_path / "out", form="fairseq2")
    found = pool(2).run(rows_read_of, str(tmp_path / "out" / "model.pt"))
    assert all(right for _, _, right in found)
    assert all(total == sum(read for read, _, _ in found) for _, total, _ in found)
    assert all(0.49 * total < read < 0.51 * total for read, total, _ in found)


def assert_first_loss_is_transformers(theirs: Path, corpus: SmallCorpus, exp: Path, overrides: tuple[str, ...]) -> None:
    records = read_metrics(exp / "metrics.jsonl", "train")
    assert len(records) == 20 and records[-1]["loss"] < records[0]["loss"]
    config = load_config("base", [*MICRO_RUN, f"data.train={corpus.train}", *overrides])
    objective = build_objective(config)
    training_set = open_training_set(config, objective)
    (window,) = training_set.windows(range(1), micro_batches=config.batch.micro_batches, rank=0, world_size=1)
    mine = records[0]["contrastive"] + objective.settings.diversity_weight * records[0]["diversity"]
    assert mine == pytest.approx(transformers_loss(theirs, window, config), rel=1e-5)
