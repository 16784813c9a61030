"""All ranks use the same checkpoint of a URL, each from its own copy, though a run uploads and deletes meanwhile."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from tests.helpers.checkpoints import SPECS, save
from tests.helpers.pool import Pool
from w2vscale.checkpoint import reader, remote
from w2vscale.checkpoint.remote import RemoteCheckpoints, model_on_all_ranks
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.distributed import process_group
from w2vscale.distributed.process_group import Patience, Ranks
from w2vscale.errors import TemporaryError, UserError
from w2vscale.storage.urls import Url


def find(folder: str, *, changed: bool = False) -> tuple[str, str, float]:
    """The copy of the newest checkpoint in a folder on a rank that has its own cache, where rank 1 sees a newer one.

    `changed`: the checkpoint is saved again after rank 0 has copied it. Also returns the path of what
    `CheckpointStore.find` finds there, and a value in it; or errors.
    """
    rank, found = dist.get_rank(), RemoteCheckpoints.committed
    version = remote.version

    def committed(self: RemoteCheckpoints) -> list[int]:
        return [update for update in found(self) if update <= 1 + rank]

    def of_later(url: Url) -> object:
        return version(url)._replace(tag=f"rank {rank}") if changed else version(url)

    cache = Path(folder) / f"cache{rank}"
    with (
        patch.dict("os.environ", W2VSCALE_CACHE=str(cache)),
        patch.object(RemoteCheckpoints, "committed", committed),
        patch.object(remote, "version", of_later),
        patch.object(reader, "expected_of", lambda config: SPECS),
    ):
        url = Url(f"file://{folder}/run")
        try:
            copy = model_on_all_ranks(url)
        except TemporaryError as error:
            return str(error), "", 0.0
        store = CheckpointStore(Path(folder) / "exp", Ranks(rank, rank, 2), expected=SPECS)
        opened = store.find(lambda text: None, url)
        assert opened is not None
        paths = (str(path.relative_to(cache.resolve())) for path in (copy.resolve(), opened.path))
        return (*paths, float(opened.tensor("model.bias").mean()))  # type: ignore[return-value]


def test_the_checkpoint_of_rank_0_is_that_of_all(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    for update in (1, 2):
        shutil.copytree(save(tmp_path / "checkpoints", update), tmp_path / "run" / f"update_{update:08d}")
    first, second = pool(2).run(find, str(tmp_path))
    assert first == second
    assert first[0] == first[1] and first[0].endswith("update_00000001")


def find_changed(folder: str) -> str:
    return find(folder, changed=True)[0]


def test_copies_of_different_versions_end_the_start_on_all_ranks(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path / "checkpoints", 1), tmp_path / "run" / "update_00000001")
    first, second = pool(2).run(find_changed, str(tmp_path))
    assert first == second and "changed while the ranks copied it" in first


def wait_for_rank_0() -> tuple[int, str]:
    """How often this rank notes progress while rank 0 works, and the error of rank 1."""
    noted: list[None] = []
    patience = Patience(lambda: noted.append(None))

    def work() -> None:
        for _ in range(8 if dist.get_rank() == 0 else 0):
            time.sleep(0.05)
            patience.progress()
        if dist.get_rank() == 1:
            raise UserError("of rank 1")

    with patch.object(process_group, "LOOK", 0.02), pytest.raises(UserError) as caught:
        patience.run(work)
    return len(noted), str(caught.value)


def test_ranks_that_wait_note_the_progress_of_the_others(pool: Callable[[int], Pool]) -> None:
    (first, error), (second, other) = pool(2).run(wait_for_rank_0)
    assert first == second and first >= 4
    assert error == other == "of rank 1"
