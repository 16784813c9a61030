"""Several hosts, each with its own address and torchrun agent: the curve is that of one host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.agents import Agents
from tests.helpers.audio import SmallCorpus
from tests.helpers.hosts import Hosts, missing_for_hosts
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(900)]

SETTINGS = ("batch.micro_batches=12", "trainer.updates=8")
THREE = {
    "ddp": SETTINGS,
    "fsdp": (*SETTINGS, "engine.name=fsdp"),
    "zero2": (*SETTINGS, "engine.name=deepspeed", "engine.deepspeed_config=zero2"),
    "zero3": (*SETTINGS, "engine.name=deepspeed", "engine.deepspeed_config=zero3"),
}
FOUR = {
    "ddp": SETTINGS,
    "hybrid": (*SETTINGS, "engine.name=fsdp", "engine.shard_size=2"),
}


def apart(
    number: int, processes: int, engines: dict[str, tuple[str, ...]], corpus: Path, folder: Path
) -> dict[str, list[float]]:
    """The losses with each engine on several hosts, with so many processes each."""
    if missing := missing_for_hosts():
        pytest.skip(missing)
    program = ["-m", "tests.helpers.one_after_another", str(corpus), str(folder / "apart"), json.dumps(engines)]
    with Hosts(number) as hosts:
        run = Agents(hosts, corpus, folder, (), processes=processes, program=program)
        run.join(400)
        (losses,) = [json.loads(line) for line in run.printed().splitlines() if line.startswith('{"ddp"')]
    return losses


def test_three_hosts_learn_like_three_processes_of_one(
    small_corpus: SmallCorpus, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    found = apart(3, 1, THREE, small_corpus.train, tmp_path)
    for engine, settings in THREE.items():
        together = pool(3).run(train_micro, str(small_corpus.train), str(tmp_path / engine), settings)[0]
        assert len(found[engine]) == 8
        assert found[engine] == pytest.approx(together, rel=1e-5), engine


def test_hybrid_sharding_on_two_hosts_with_two_processes_learns_like_ddp(
    small_corpus: SmallCorpus, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    found = apart(2, 2, FOUR, small_corpus.train, tmp_path)
    ddp = pool(4).run(train_micro, str(small_corpus.train), str(tmp_path / "ddp"), SETTINGS)[0]
    assert len(ddp) == 8
    assert found["hybrid"] == pytest.approx(ddp, rel=1e-5)
    assert found["ddp"] == pytest.approx(ddp, rel=1e-5)
