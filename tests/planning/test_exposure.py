"""Hours and epochs of a run, and which numbers of epochs are warned about."""

from __future__ import annotations

import pytest

from w2vscale.objectives import load
from w2vscale.planning.exposure import Corpus, exposure, unusual_epochs


def test_hours_of_the_published_base_model() -> None:
    """Baevski et al. 2020: 400,000 updates of 1.6 hours on 960 hours, if every micro-batch is full."""
    config, _ = load("base")
    assert exposure(config, None).hours_per_update == pytest.approx(0.9 * 64 * 87.5 / 3600)
    assert exposure(config, None).epochs is None
    full = exposure(config, Corpus(hours=960.0, micro_batches=round(960 * 3600 / 87.5)))
    assert full.hours_per_update == pytest.approx(1.56, abs=0.01)
    assert full.hours == pytest.approx(400_000 * 1.5556, rel=1e-3)
    assert full.epochs == pytest.approx(648, abs=1)


@pytest.mark.parametrize(
    ("preset", "hours"),
    [
        ("base", 960),
        ("large", 960),
        ("large_lv60", 60_000),
        ("xlsr_2b", 436_000),
        ("ctc_10min", 1 / 6),
        ("ctc_10h", 10),
        ("ctc_960h", 960),
        ("tiny", 5),
    ],
)
def test_published_recipes_are_not_warned_about(preset: str, hours: float) -> None:
    config, objective = load(preset, new=False)
    micro_batches = max(round(hours * 3600 / config.batch.max_seconds), 1)
    assert unusual_epochs(config, objective, Corpus(hours, micro_batches)) is None


def test_large_on_five_hours() -> None:
    """128 micro-batches of 75 s are 2.67 hours, so that a million updates are 533,333 epochs."""
    config, objective = load("large_lv60")
    line = unusual_epochs(config, objective, Corpus(5.0, 240))
    assert line == (
        "trainer.updates=1000000 amounts to 533,333 epochs of data.train (5 hours per epoch, 2.7 per update): "
        "for 1,000 epochs set trainer.updates=1900 schedule.warmup_updates=61"
    )
    settings = line.partition("epochs set ")[2].split()
    changed, _ = load("large_lv60", settings)  # they are valid together
    assert exposure(changed, Corpus(5.0, 240)).epochs == pytest.approx(1000, rel=0.05)
    assert unusual_epochs(changed, objective, Corpus(5.0, 240)) is None


def test_less_than_half_an_epoch() -> None:
    config, objective = load("base", ["trainer.updates=40000"])
    line = unusual_epochs(config, objective, Corpus(500_000.0, 20_000_000))
    assert line == (
        "trainer.updates=40000 amounts to 13% of an epoch of data.train (500,000 hours per epoch, 1.6 per update): "
        "to see all of it, set trainer.updates=320000"
    )
