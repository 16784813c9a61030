"""Ranks that open a model: they share the hashing of its files, and the memory for its evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.checkpoint.test_verification import content, spread
from tests.faults.test_damaged_checkpoints import flip
from tests.helpers.audio import SmallCorpus
from tests.helpers.checkpoints import seal
from tests.helpers.exported import random_model, save_model
from tests.helpers.micro import MICRO_RUN
from tests.helpers.pool import Pool
from tests.helpers.stores import free_port
from tests.helpers.tasks import evaluations, hashed_to_start_from
from w2vscale.checkpoint.format import TrainState, folder_name
from w2vscale.config import load_config

pytestmark = pytest.mark.distributed
FILES = [f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 3 and 4, each in three files with tensors."""
    run = tmp_path_factory.mktemp("made")
    for update in (3, 4):
        path = spread(run / "checkpoints" / "new", {name: value + update for name, value in content().items()})
        seal(path, update=update)
        path.rename(path.with_name(folder_name(update)))
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


class TestStartingFromACheckpoint:
    def test_each_file_is_hashed_by_one_rank(self, pool: Callable[[int], Pool], run: Path) -> None:
        (first, opened), (second, same) = pool(2).run(hashed_to_start_from, str(run))
        assert sorted(first + second) == FILES
        assert opened == same == f"starting from {run}/checkpoints/{folder_name(4)}"

    @pytest.mark.parametrize("file", FILES)
    def test_damage_that_one_rank_finds_is_damage_for_all(
        self, pool: Callable[[int], Pool], run: Path, file: str
    ) -> None:
        newest = run / "checkpoints" / folder_name(4)
        flip(newest / file, -2)
        message = f"{newest / file}: its content is not what was written (SHA-256)"
        assert [error for _, error in pool(2).run(hashed_to_start_from, str(newest))] == [message] * 2
        found = [opened for _, opened in pool(2).run(hashed_to_start_from, str(run))]
        assert found == [f"starting from {run}/checkpoints/{folder_name(3)}"] * 2

    def test_a_missing_one_is_the_same_error_on_all(self, pool: Callable[[int], Pool], run: Path) -> None:
        one, other = pool(2).run(hashed_to_start_from, str(run / "absent"))
        assert one == other and one[1].startswith(f"{run}/absent: no such checkpoint")


def test_a_model_of_the_default_engine_is_sharded_to_be_evaluated(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    """As imported models are. With engine.name=ddp each rank has a whole one; the metrics are the same."""
    config = load_config("base", [*MICRO_RUN, f"data.train={small_corpus.train}"])
    assert config.engine.name == "ddp"
    save_model(tmp_path / "exp", config, random_model(config, seed=2).state_dict(), TrainState())
    ports = {(): free_port(), ("engine.name=ddp",): free_port()}
    with closing(Pool(2, tmp_path)) as new:
        first, second = new.run(evaluations, str(tmp_path / "exp"), str(small_corpus.validation), ports)
    assert [sharded for sharded, _ in first] == [sharded for sharded, _ in second] == [True, False]
    (_, sharded), (_, whole) = first
    assert whole["masked_frames"] > 0
    for key, value in whole.items():
        assert sharded[key] == pytest.approx(value, rel=1e-5), key
