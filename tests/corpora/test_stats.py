"""Statistics of a corpus against the audio that its files were made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest
from tests.helpers.batches import plan_of
from w2vscale.config import load_config
from w2vscale.corpora.folder import prepare_folder
from w2vscale.corpora.index import build_index
from w2vscale.corpora.stats import CorpusStats, corpus_stats
from w2vscale.data.manifest import Corpus
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective

CONFIG = load_config("tiny", ["data.max_seconds=4", "data.min_seconds=1.9", "batch.max_seconds=12"])


def stats_of(manifests: list[Path]) -> CorpusStats:
    return corpus_stats(manifests, CONFIG, build_objective(CONFIG))


def test_totals_speakers_transcripts_and_rates_of_a_folder(mixed_audio: Path, tmp_path: Path) -> None:
    (written,) = prepare_folder(mixed_audio, tmp_path).manifests
    build_index(written.path)
    found = stats_of([written.path])
    assert (found.durations.size, found.speakers, found.transcribed) == (6, 3, 2)
    assert found.sampling_rates == {8_000: 1, 16_000: 2, 44_100: 2, 48_000: 1}
    assert (found.median, found.durations.mean()) == pytest.approx((3.25, 3.5), abs=0.01)
    assert sorted(found.durations) == pytest.approx([2.0, 2.5, 3.0, 3.5, 4.0, 6.0], abs=0.01)


def test_the_histogram_counts_every_utterance_and_hour_once(small_corpus: SmallCorpus) -> None:
    found = stats_of([small_corpus.train, small_corpus.validation])
    histogram = found.histogram(7)
    assert len(histogram) == 7
    assert sum(count for _, _, count, _ in histogram) == found.durations.size == 30
    assert sum(hours for *_, hours in histogram) == pytest.approx(found.durations.sum() / 3600)
    edges = [(start, end) for start, end, _, _ in histogram]
    assert edges[0][0] == found.durations.min() and edges[-1][1] == found.durations.max()
    assert all(edges[i][1] == edges[i + 1][0] for i in range(6))


def test_buckets_and_padding_are_those_of_the_plan(small_corpus: SmallCorpus) -> None:
    stats = stats_of([small_corpus.train])
    found, plan = stats.plan, plan_of(Corpus([small_corpus.train]), CONFIG, seed=CONFIG.trainer.seed)
    assert (found.per_epoch, found.padding(), found.left_out) == (plan.per_epoch, plan.padding(), plan.left_out)
    assert found.left_out == int((Corpus([small_corpus.train]).manifests[0].durations < 1.9).sum()) > 0
    assert sum(bucket.count for bucket in found.buckets) == stats.durations.size - found.left_out
    assert np.all(np.diff([bucket.longest for bucket in found.buckets]) < 0)
    assert found.buckets[0].longest == 4 * 16_000


def test_a_corpus_of_equally_long_utterances_has_no_padding(tmp_path: Path) -> None:
    cuts = [cut_of(write_audio(tmp_path / f"{n}.wav", noise(2.0, seed=n))) for n in range(3)]
    found = stats_of([write_manifest(tmp_path / "cuts.jsonl", cuts)])
    assert (set(found.durations), found.plan.padding()) == ({2.0}, 0.0)
    assert (found.speakers, found.transcribed) == (0, 0)


def test_a_missing_manifest_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.jsonl: no such manifest"):
        stats_of([tmp_path / "no.jsonl"])
