"""Hosts of a run whose run folder is not shared are named before any training."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import Command


def hosts(corpus: SmallCorpus, folder: Path, *folders: Path) -> list[Command]:
    """A run of two hosts with one process each, with these run folders."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ["train", "base", *MICRO_RUN, f"data.train={corpus.train}", "trainer.updates=4"]
    started = []
    for rank, exp in enumerate(folders):
        launcher = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in launcher.items()}
        started.append(Command(folder / f"{rank}.log", *settings, "--exp", str(exp), environment=environment))
    return started


@pytest.mark.long
@pytest.mark.distributed
def test_a_folder_on_the_disk_of_each_host_is_refused(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    (tmp_path / "b" / "exp").mkdir(parents=True)
    (tmp_path / "b" / "exp" / "lock").write_text('{"host": "of an earlier run"}')
    ranks = hosts(small_corpus, tmp_path, tmp_path / "a" / "exp", tmp_path / "b" / "exp")
    printed = [rank.finish(code=2, timeout=120.0) for rank in ranks]
    name = socket.gethostname()
    (line,) = [line for line in printed[0].splitlines() if line.startswith("error")]
    assert line.startswith(
        f"error: {tmp_path}/a/exp: the folder of the run on {name} (rank 0) is not the one on {name}; "
    )
    assert "update 1/" not in printed[0]
    assert not (tmp_path / "a" / "exp" / "lock").exists()


@pytest.mark.long
@pytest.mark.distributed
def test_a_shared_folder_is_recognised(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    ranks = hosts(small_corpus, tmp_path, tmp_path / "exp", tmp_path / "exp")
    printed = [rank.finish(code=0, timeout=120.0) for rank in ranks]
    assert "update 4/4" in printed[0]
