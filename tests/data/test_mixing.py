"""Corpora and languages have the requested shares of an epoch, and the plan is still a pure function."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lhotse import SupervisionSegment
from lhotse.cut import Cut
from numpy.typing import NDArray

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.batches import plan_of
from w2vscale.config import Config, load_config
from w2vscale.config.tree import MixConfig
from w2vscale.corpora.stats import CorpusStats, corpus_stats
from w2vscale.data.manifest import Corpus
from w2vscale.data.mixing import draw_rates, groups
from w2vscale.data.plan import Mix, Plan
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective


def mixed_plan(samples: NDArray[np.int64], group: NDArray[np.int64], rates: list[float], **changes: int) -> Plan:
    settings = {"max_samples": 100, "min_samples": 1, "budget_samples": 400, "buckets": 8, "seed": 3} | changes
    return Plan(samples, mix=Mix(group, np.array(rates)), **settings)


def draws(plan: Plan, epochs: range) -> Counter[int]:
    numbers = range(epochs.start * plan.per_epoch, epochs.stop * plan.per_epoch)
    return Counter(int(u) for number in numbers for u in plan.micro_batch(number).utterances)


class TestPlan:
    @given(
        count=st.integers(2, 200),
        rates=st.lists(st.floats(0.05, 8.0), min_size=3, max_size=3),
        series_length=st.sampled_from([1, 4, 6]),
        seed=st.integers(0, 2**63 - 1),
    )
    def test_epochs_are_equally_long_and_full(
        self, count: int, rates: list[float], series_length: int, seed: int
    ) -> None:
        random = np.random.default_rng(count)
        samples, group = random.integers(10, 150, count), random.integers(0, 3, count)
        plan = mixed_plan(samples, group, rates, seed=seed, series_length=series_length)
        for epoch in (0, 1, 17):
            batches = [plan.micro_batch(epoch * plan.per_epoch + i) for i in range(plan.per_epoch)]
            assert sum(batch.utterances.size for batch in batches) == len(plan)
            assert all(batch.utterances.size * batch.longest <= 400 for batch in batches)
        assert plan.micro_batch(plan.per_epoch - 1).epoch == 0

    @given(
        count=st.integers(1, 300),
        rates=st.lists(st.floats(0.01, 5.0), min_size=3, max_size=3),
        epochs=st.integers(1, 12),
        series_length=st.sampled_from([1, 4, 6]),
        seed=st.integers(0, 2**63 - 1),
    )
    def test_all_utterances_of_a_group_are_drawn_equally_often(
        self, count: int, rates: list[float], epochs: int, series_length: int, seed: int
    ) -> None:
        random = np.random.default_rng(count)
        group = random.integers(0, 3, count)
        plan = mixed_plan(random.integers(10, 150, count), group, rates, seed=seed, series_length=series_length)
        found = draws(plan, range(epochs))
        for number, rate in enumerate(rates):
            counts = np.array([found[int(u)] for u in np.flatnonzero(group == number)])
            if counts.size:
                assert counts.sum() == epochs * max(round(rate * counts.size), 1)
                assert counts.max() - counts.min() <= 1

    def test_groups_get_their_shares_with_any_number_of_buckets_and_small_groups(self) -> None:
        random = np.random.default_rng(0)
        sizes = [20_000, 3000, *[200] * 60]
        group = np.repeat(np.arange(len(sizes)), sizes)
        samples = random.integers(10, 100, group.size)
        rates = np.array([1.0, 2.5, *[0.02] * 60])
        found = draws(mixed_plan(samples, group, rates.tolist(), buckets=64), range(2))
        realised = np.bincount(group, weights=[found[u] for u in range(group.size)])
        assert realised == pytest.approx(2 * rates * sizes)

    def test_a_draw_takes_utterances_of_similar_length_in_every_epoch(self) -> None:
        random = np.random.default_rng(0)
        samples, group = random.integers(10, 100, 3000), random.integers(0, 3, 3000)
        mixed, plain = mixed_plan(samples, group, [0.1, 1.0, 2.6]), mixed_plan(samples, group * 0, [1.0])
        assert len(mixed.buckets) == len(plain.buckets) == 8
        assert mixed.padding() < plain.padding() + 0.01

    def test_one_utterance_is_an_epoch(self) -> None:
        plan = mixed_plan(np.array([15]), np.array([0]), [1.0])
        assert len(plan) == plan.per_epoch == 1

    def test_every_group_is_drawn_from_however_small_its_rate(self) -> None:
        group = np.array([0] * 100 + [1])
        assert draws(mixed_plan(np.full(101, 50), group, [1.0, 1e-9]), range(1))[100] == 1

    def test_any_position_is_reached_without_the_ones_before(self) -> None:
        random = np.random.default_rng(1)
        samples, group = random.integers(10, 150, 200), random.integers(0, 2, 200)
        walked, jumped = (mixed_plan(samples, group, [0.4, 2.3]) for _ in range(2))
        last = [walked.micro_batch(number) for number in range(5 * walked.per_epoch)][-1]
        there = jumped.micro_batch(5 * jumped.per_epoch - 1)
        assert there.utterances.tolist() == last.utterances.tolist()
        assert there.offsets.tolist() == last.offsets.tolist()

    def test_a_micro_batch_has_utterances_of_several_groups(self) -> None:
        random = np.random.default_rng(2)
        group = random.integers(0, 2, 400)
        plan = mixed_plan(random.integers(40, 50, 400), group, [1.0, 1.0])
        met = [len(set(group[plan.micro_batch(n).utterances].tolist())) for n in range(plan.per_epoch)]
        assert np.mean(met) > 1.7


class TestRates:
    HOURS = np.array([900.0, 90.0, 10.0])

    def shares(self, **mix: object) -> NDArray[np.float64]:
        group = np.array([0] * 9 + [1] * 9 + [2])
        samples = np.repeat(self.HOURS / [9, 9, 1], [9, 9, 1]).astype(np.int64)
        rates = draw_rates(group, ["a", "b", "c"], samples, MixConfig.model_validate({"by": "language", **mix}))
        drawn = np.bincount(group, weights=rates[group] * samples)
        assert drawn.sum() == pytest.approx(samples.sum())
        shares: NDArray[np.float64] = drawn / drawn.sum()
        return shares

    def test_temperature_one_leaves_the_corpus_as_it_is(self) -> None:
        assert self.shares(temperature=1.0) == pytest.approx(self.HOURS / 1000)

    def test_temperature_zero_makes_all_equal(self) -> None:
        assert self.shares(temperature=0.0) == pytest.approx([1 / 3] * 3)

    def test_between_them_shares_follow_the_power_of_the_hours(self) -> None:
        assert self.shares(temperature=0.5) == pytest.approx(self.HOURS**0.5 / (self.HOURS**0.5).sum())

    def test_weights_are_shares(self) -> None:
        assert self.shares(weights={"a": 1, "b": 2, "c": 1}) == pytest.approx([0.25, 0.5, 0.25])

    def test_a_group_without_usable_audio_is_left_out(self) -> None:
        rates = draw_rates(np.array([0, 1]), ["a", "b"], np.array([100, 0]), MixConfig(by="language", temperature=0.0))
        assert rates.tolist() == [1.0, 0.0]

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({"a": 1, "b": 1, "c": 1, "d": 1}, r"mix.weights: d: no such language in data.train \(has: a, b, c\)"),
            ({"a": 1, "c": 1}, r"mix.weights: no weight for b; name every language of data.train"),
        ],
    )
    def test_weights_that_name_other_groups_are_errors(self, weights: dict[str, float], message: str) -> None:
        with pytest.raises(UserError, match=message):
            self.shares(weights=weights)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two corpora: 30 German and 6 Dutch utterances, 12 Dutch and 3 without a language."""
    folder = tmp_path_factory.mktemp("languages")
    audio = [write_audio(folder / f"{n}.flac", noise(1.5 + 0.1 * (n % 5), seed=n)) for n in range(5)]
    written = []
    for corpus, counts in (("one", {"de": 30, "nl": 6}), ("two", {"nl": 12, None: 3})):
        cuts = []
        for language, count in counts.items():
            cuts += [_spoken(audio[n % 5], f"{corpus}-{language}-{n}", language) for n in range(count)]
        written.append(write_manifest(folder / f"{corpus}.jsonl", cuts))
    return written


def _spoken(audio: Path, name: str, language: str | None) -> Cut:
    cut = cut_of(audio, identifier=name)
    spoken = SupervisionSegment(id=name, recording_id=name, start=0.0, duration=cut.duration, language=language)
    return replace(cut, id=name, supervisions=[spoken])


def settings(*overrides: str) -> Config:
    return load_config("tiny", ["data.max_seconds=2", "data.min_seconds=1", "batch.max_seconds=6", *overrides])


def test_groups_are_manifests_languages_or_both(manifests: list[Path]) -> None:
    corpus = Corpus(manifests)
    one, two = map(str, manifests)
    expected = {
        "corpus": {one: 36, two: 15},
        "language": {"de": 30, "nl": 18, "unknown": 3},
        "corpus/language": {f"{one}/de": 30, f"{one}/nl": 6, f"{two}/nl": 12, f"{two}/unknown": 3},
    }
    for by, sizes in expected.items():
        group, names = groups(corpus, by)
        assert {name: int((group == number).sum()) for number, name in enumerate(names)} == sizes


def test_the_plan_of_a_run_is_mixed_and_that_of_validation_is_not(manifests: list[Path]) -> None:
    config = settings("mix.by=language", "mix.temperature=0")
    corpus = Corpus(manifests)
    plan = plan_of(corpus, config, mixed=True)
    spoken = Counter(corpus.cut(u).supervisions[0].language for u in draws(plan, range(1)).elements())
    assert max(spoken.values()) - min(spoken.values()) <= 9
    assert set(draws(plan_of(corpus, config), range(1)).values()) == {1}


def _stats(manifests: list[Path], *overrides: str) -> CorpusStats:
    config = settings(*overrides)
    return corpus_stats(manifests, config, build_objective(config))


def test_stats_show_the_mix(manifests: list[Path]) -> None:
    found = _stats(manifests, "mix.by=language", "mix.temperature=0.0")
    shares = {group.name: group for group in found.mix}
    assert set(shares) == {"de", "nl", "unknown"}
    assert sum(group.share for group in found.mix) == pytest.approx(1.0)
    assert sum(group.epoch_share for group in found.mix) == pytest.approx(1.0)
    assert shares["de"].share > 0.5 > shares["de"].epoch_share
    assert shares["unknown"].draws > 3 * shares["de"].draws
    assert _stats(manifests).mix == []


def test_weights_come_from_the_command_line(manifests: list[Path]) -> None:
    weights = json.dumps({"de": 1, "nl": 1, "unknown": 2})
    config = settings("mix.by=language", f"mix.weights={weights}")
    assert config.mix.weights == {"de": 1.0, "nl": 1.0, "unknown": 2.0}
    with pytest.raises(UserError, match=r"weights need mix\.by"):
        settings(f"mix.weights={weights}")
