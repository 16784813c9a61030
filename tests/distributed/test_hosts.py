"""Several hosts, each with its own address and torchrun agent: the curve is that of one host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.agents import Agents
from tests.helpers.audio import SmallCorpus
from tests.helpers.hosts import Hosts, missing_for_hosts
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(900)]

SETTINGS = ("batch.micro_batches=12", "trainer.updates=8")
ENGINES = {
    "ddp": (),
    "fsdp": ("engine.name=fsdp",),
    "zero2": ("engine.name=deepspeed", "engine.deepspeed_config=zero2"),
    "zero3": ("engine.name=deepspeed", "engine.deepspeed_config=zero3"),
}


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    if missing := missing_for_hosts():
        pytest.skip(missing)
    with Hosts(3) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def four() -> Iterator[Hosts]:
    """Two hosts."""
    if missing := missing_for_hosts():
        pytest.skip(missing)
    with Hosts(2) as hosts:
        yield hosts


@pytest.mark.parametrize("engine", ENGINES)
def test_three_hosts_learn_like_three_processes_of_one(
    engine: str, three: Hosts, small_corpus: SmallCorpus, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    settings = (*SETTINGS, *ENGINES[engine])
    together = pool(3).run(train_micro, str(small_corpus.train), str(tmp_path / "one"), settings)[0]
    apart = Agents(three, small_corpus.train, tmp_path / "three", settings).finish()
    assert len(apart) == 8
    assert apart == pytest.approx(together, rel=1e-5)


def test_hybrid_sharding_on_two_hosts_with_two_processes_learns_like_ddp(
    four: Hosts, small_corpus: SmallCorpus, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    ddp = pool(4).run(train_micro, str(small_corpus.train), str(tmp_path / "ddp"), SETTINGS)[0]
    settings = (*SETTINGS, "engine.name=fsdp", "engine.shard_size=2")
    hybrid = Agents(four, small_corpus.train, tmp_path / "hybrid", settings, processes=2).finish()
    assert hybrid == pytest.approx(ddp, rel=1e-5)
