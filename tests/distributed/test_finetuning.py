"""Fine-tuning on every engine is one curve, frozen and not, and goes on on another number of processes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.exported import random_model, save_model
from tests.helpers.micro import MICRO_RUN
from tests.helpers.pool import Pool
from tests.helpers.spelled import SPELLING, some_texts, write_spelled
from tests.helpers.tasks import gather_unevenly, train_micro, word_errors
from tests.helpers.tiers import long
from tests.training.test_finetuning import settings
from tools.bench.engine_parity import ENGINES
from w2vscale.checkpoint.format import TrainState
from w2vscale.config import load_config
from w2vscale.evaluation.wer import score_checkpoint
from w2vscale.inference.pretrained import load
from w2vscale.training.train import train

pytestmark = pytest.mark.distributed
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

TUNING = (
    *SPELLING, "trainer.updates=6", "checkpoint.every=3", "checkpoint.keep_last=3", "data.max_seconds=2",
    "batch.max_seconds=3", "objective.freeze_encoder_updates=2", "objective.channel_mask_probability=0.5",
    "objective.channel_mask_length=4", "regularization.feature_grad_mult=0",
)  # fmt: skip


def figures(exp: Path) -> list[tuple[float, float]]:
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_spelled(tmp_path_factory.mktemp("spelled"), some_texts(12))


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The settings, with a pretrained model (of random weights) to start from."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = load_config("base", MICRO_RUN)
    save_model(folder, config, random_model(config, seed=6).state_dict(), TrainState(update=9))
    return (*TUNING, f"trainer.init_from={folder}")


@pytest.fixture(scope="module")
def alone(corpus: Path, tuning: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    exp = tmp_path_factory.mktemp("alone") / "exp"
    train(settings(corpus, *tuning), exp)
    return exp


@pytest.mark.parametrize("engine", [long("ddp"), "fsdp", long("zero2"), "zero3"])
def test_two_processes_learn_what_one_does(
    pool: Callable[[int], Pool], corpus: Path, alone: Path, tuning: tuple[str, ...], tmp_path: Path, engine: str
) -> None:
    pool(2).run(train_micro, str(corpus), str(tmp_path), (*tuning, ENGINES[engine]))
    found, expected = figures(tmp_path), figures(alone)
    assert len(found) == 6
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


def test_a_run_of_one_process_goes_on_in_two(
    pool: Callable[[int], Pool], corpus: Path, alone: Path, tuning: tuple[str, ...], tmp_path: Path
) -> None:
    exp = tmp_path / "exp"
    shutil.copytree(alone, exp, symlinks=True)
    shutil.rmtree(exp / "checkpoints" / "update_00000006")
    pool(2).run(train_micro, str(corpus), str(exp), (*tuning, ENGINES["fsdp"]))
    for (loss, norm), (expected_loss, expected_norm) in zip(figures(exp), figures(alone), strict=True):
        assert (loss, norm) == (pytest.approx(expected_loss, rel=1e-5), pytest.approx(expected_norm, rel=1e-5))


def test_what_ranks_find_reaches_all_of_them_soon(pool: Callable[[int], Pool]) -> None:
    of_ranks = pool(3).run(gather_unevenly, (8, 0, 2))
    assert of_ranks[0] == of_ranks[1] == of_ranks[2]
    assert sorted(of_ranks[0]) == [(0, number) for number in range(8)] + [(2, 0), (2, 1)]
    assert of_ranks[0][-1] == (0, 7) and (2, 1) in of_ranks[0][:4]


def test_ranks_share_the_decoding(pool: Callable[[int], Pool], corpus: Path, alone: Path) -> None:
    expected = score_checkpoint(load(alone), [corpus])
    written = [(one.utterance, one.hypothesis) for one in expected.utterances]
    assert pool(2).run(word_errors, str(alone), str(corpus)) == [(6, written), (6, written)]
