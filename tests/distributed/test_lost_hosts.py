"""Hosts that are lost, cut off, or far away: a run on several hosts survives it or restarts, and says what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.agents import Agents
from tests.helpers.audio import SmallCorpus
from tests.helpers.hosts import Hosts, missing_for_hosts
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(900)]

UPDATES = 40
SETTINGS = ("batch.micro_batches=12", "checkpoint.every=2", f"trainer.updates={UPDATES}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if missing := missing_for_hosts():
        pytest.skip(missing)
    with Hosts(3, delays=True) as three:
        yield three


@pytest.fixture(scope="module")
def curve(
    small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory, pool: Callable[[int], Pool]
) -> list[float]:
    """The loss of each update of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("untouched")
    return pool(3).run(train_micro, str(small_corpus.train), str(folder / "exp"), SETTINGS)[0]


def test_two_hosts_go_on_without_a_third_and_take_it_back(
    hosts: Hosts, small_corpus: SmallCorpus, tmp_path: Path, curve: list[float]
) -> None:
    """The third host loses its power: nothing tells the others. They go on from the newest checkpoint."""
    settings = (*SETTINGS, "watchdog.seconds=10")
    run = Agents(hosts, small_corpus.train, tmp_path, settings, nodes="2:3", restarts=3)
    run.wait_for_update(6)
    killed = time.monotonic()
    hosts.kill(hosts[2])
    before = run.printed().count("ddp on 2 ranks")
    while run.printed().count("ddp on 2 ranks") == before:
        assert time.monotonic() - killed < 240, run.printed()
        time.sleep(0.1)
    print(f"two hosts went on after {time.monotonic() - killed:.0f} s")
    assert "rank 2 on host3: not heard of for 1" in run.printed()
    hosts.reconnect(hosts[2])
    run.start(hosts[2])
    losses = run.finish()
    printed = run.printed()
    assert printed.count("ddp on 3 ranks") == 2, printed
    assert "stopped by SIGTERM; the same command continues from here" in printed  # to take it back
    assert losses == pytest.approx(curve, rel=1e-5)


def test_a_partition_is_survived_or_restarted_after(
    hosts: Hosts, small_corpus: SmallCorpus, tmp_path: Path, curve: list[float]
) -> None:
    """One of 10 seconds, and one that outlasts the watchdog: all hosts are needed, so both sides start again."""
    run = Agents(hosts, small_corpus.train, tmp_path, (*SETTINGS, "watchdog.seconds=25"), restarts=3)
    run.wait_for_update(6)
    hosts.cut(hosts[1])
    time.sleep(10)
    hosts.reconnect(hosts[1])
    run.wait_for(hosts[1], "warning: rank 1 on host2 had no answer from rank 0 on host1 for ")
    run.wait_for_update(max(run.updates()) + 1)
    assert "not heard of" not in run.printed()
    hosts.cut(hosts[1])
    time.sleep(40)
    hosts.reconnect(hosts[1])
    assert run.finish() == pytest.approx(curve, rel=1e-5)
    assert "rank 1 on host2: not heard of for" in run.output(hosts[0]).read_text()
    assert "resumed from" in run.output(hosts[0]).read_text()


def test_a_delay_of_50_ms_and_a_loss_of_one_percent(hosts: Hosts, small_corpus: SmallCorpus, tmp_path: Path) -> None:
    hosts.worsen(delay=0.05, loss=0.01)
    settings = (*SETTINGS, "trainer.updates=10")
    losses = Agents(hosts, small_corpus.train, tmp_path, settings).finish(seconds=400)
    assert losses == pytest.approx(train_micro(str(small_corpus.train), str(tmp_path / "one"), settings), rel=1e-5)


def test_the_host_of_the_rendezvous_is_lost(hosts: Hosts, small_corpus: SmallCorpus, tmp_path: Path) -> None:
    """The others cannot find each other any more. They end, as soon as the system gives up their connections to it."""
    hosts.give_up_after(5)
    run = Agents(hosts, small_corpus.train, tmp_path, (*SETTINGS, "watchdog.seconds=5"), nodes="2:3", restarts=3)
    run.wait_for_update(6)
    hosts.kill(hosts[0])
    codes = [run.agents[host].wait(240) for host in (hosts[1], hosts[2])]
    assert codes == [75, 75], run.printed()
    assert "error: the machines cannot find each other at --rdzv-endpoint: " in run.output(hosts[1]).read_text()
    assert "watchdog: rank 0 on host1 has not been heard of for" in run.printed()
