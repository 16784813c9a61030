"""`objective.mask_trim=micro_batch`: the masks of fairseq, and still a pure function of seed and micro-batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.batches import config_with, dataset_of, inputs_of, same, windows_of
from tests.helpers.spelled import SPELLED, some_texts, write_spelled
from w2vscale.config import load_config
from w2vscale.data.inputs import join
from w2vscale.data.randomness import Stream, generator
from w2vscale.objectives import build_objective
from w2vscale.objectives.masking import Spans, draw_masks, trim

BATCHES = 2000
REFUSED_AT = 1.95 * (2 / BATCHES) ** 0.5  # two-sample Kolmogorov-Smirnov, p = 0.001


class Case(NamedTuple):
    """A micro-batch: `base` has 5 crops of 15.6 s, and `ctc_100h` 16 utterances of 12.5 s."""

    size: int
    spans: Spans
    rows: int
    one_rounding: bool = True


TIME = Case(781, Spans(0.65, 10, 2), 5)
CASES = {
    "time": TIME,
    "time, fine-tuning": Case(624, Spans(0.65, 10, 2), 6, one_rounding=False),
    "channels of ctc_100h": Case(768, Spans(0.5, 64, 0), 16),
    "channels of ctc_960h": Case(768, Spans(0.1, 64, 0), 16),  # 1 or 2 spans, in all rows
    "channels of XLS-R 2B": Case(1920, Spans(0.25, 64, 0), 6),  # 7 or 8
}
CHANNELS = CASES["channels of ctc_100h"]


def batch_of_fairseq(case: Case, draws: random.Random) -> list[set[int]]:
    """The algorithm of `compute_mask_indices` with `require_same_masks`, written from its description, with sets.

    The number of spans is rounded once for all rows, or in each row if utterances are padded.
    """
    (probability, length, least), masks = case.spans, []
    rounding = draws.random()
    for _ in range(case.rows):
        rounding = rounding if case.one_rounding else draws.random()
        count = max(least, int(probability * case.size / length + rounding))
        starts = draws.sample(range(case.size - length), count)
        masks.append({place for start in starts for place in range(start, start + length)})
    smallest = min(map(len, masks))
    return [set(draws.sample(sorted(mask), smallest)) for mask in masks]


def batch_of_ours(case: Case, number: int, *, trimmed: bool = True) -> list[NDArray[np.bool_]]:
    generators = [generator(3, Stream.MASK, number, place) for place in range(case.rows)]
    return draw_masks([case.size] * case.rows, case.spans, generators, trimmed=trimmed, one_rounding=case.one_rounding)


def run_lengths(mask: Sequence[bool]) -> list[int]:
    return [sum(1 for _ in run) for masked, run in groupby(mask) if masked]


@cache
def share_and_run(case: Case, which: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of one utterance of each of 2,000 batches: the share that is masked, and the length of one of its runs."""
    draws, found = random.Random(which), []
    for number in range(BATCHES):
        if which == "fairseq":
            marked = batch_of_fairseq(case, draws)[0]
            mask = [place in marked for place in range(case.size)]
        else:
            mask = batch_of_ours(case, number, trimmed=which == "trimmed")[0].tolist()
        found.append((sum(mask) / len(mask), draws.choice(run_lengths(mask))))
    shares, runs = np.array(found).T
    return shares, runs


def distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The largest distance of two empirical distribution functions."""
    values = np.union1d(one, other)
    ranks = [np.searchsorted(np.sort(sample), values, side="right") / sample.size for sample in (one, other)]
    return float(np.abs(ranks[0] - ranks[1]).max())


@pytest.mark.parametrize("what", [0, 1], ids=["share", "run length"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_masks_have_the_distribution_of_fairseq(case: Case, what: int) -> None:
    theirs = share_and_run(case, "fairseq")[what]
    assert distance(share_and_run(case, "trimmed")[what], theirs) < REFUSED_AT
    assert distance(share_and_run(case, "whole")[what], theirs) > 2 * REFUSED_AT  # the test could tell


def test_trimming_masks_less_in_shorter_runs() -> None:
    """The figures of the documentation: docs/hyperparameters.md."""
    shares = [share_and_run(TIME, which)[0].mean() for which in ("whole", "trimmed")]
    assert shares == pytest.approx([0.4905, 0.464], abs=0.004)
    runs = [
        [
            length
            for number in range(200)
            for length in run_lengths(batch_of_ours(TIME, number, trimmed=trimmed)[0].tolist())
        ]
        for trimmed in (False, True)
    ]
    assert [np.mean(each) for each in runs] == pytest.approx([14.6, 8.5], abs=0.4)
    channels = [share_and_run(CHANNELS, which)[0].mean() for which in ("whole", "trimmed")]
    assert channels == pytest.approx([0.404, 0.304], abs=0.01)


def test_utterances_of_different_lengths_get_the_smallest_count() -> None:
    objective = build_objective(load_config("base", ["objective.mask_trim=micro_batch"]))
    audio = [np.ones(size, dtype=np.float32) for size in (40_000, 64_000, 250_000)]
    plain = inputs_of(build_objective(load_config("base")), audio).audio.mask_BT
    inputs = inputs_of(objective, audio)
    assert len(set(inputs.masked)) == 1
    assert inputs.masked[0] == int(plain.sum(dim=1).min()) and inputs.weights == (3 * inputs.masked[0],)
    assert not (inputs.audio.mask_BT & ~plain).any()


def test_each_masked_frame_is_kept_equally_often() -> None:
    masks = [np.arange(40) < 30, np.arange(40) < 10]
    kept = np.zeros(40)
    for number in range(2000):
        long, short = trim(masks, [np.random.default_rng((number, place)) for place in range(2)])
        assert np.array_equal(short, masks[1]) and long.sum() == 10
        kept += long
    assert not kept[30:].any()
    assert np.abs(kept[:30] / 2000 - 1 / 3).max() < 5 * (2 / 9 / 2000) ** 0.5


def test_without_utterances_there_is_nothing_to_trim() -> None:
    objective = build_objective(load_config("ctc_1h", ["objective.mask_trim=micro_batch"]))
    assert not inputs_of(objective, []).channel_mask_BD.any()


CTC = (*SPELLED, "objective.name=ctc", "objective.channel_mask_probability=0.5", "objective.channel_mask_length=8")


@pytest.mark.parametrize("settings", [(), CTC], ids=["pretraining", "fine-tuning"])
def test_masks_do_not_depend_on_the_number_of_ranks_or_on_what_shares_a_forward(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    manifest = write_spelled(tmp_path, some_texts(40))
    series = ("batch.micro_batches=4", "batch.same_bucket=1", "batch.max_seconds=10", "data.min_seconds=0.1")
    config = config_with(
        *settings,
        *series,
        "objective.vocabulary=letters" if settings else "objective.negatives=5",
        "objective.mask_trim=micro_batch",
    )
    dataset = dataset_of(manifest, config)
    alone = {batch.number: batch for batch in (dataset[number] for number in range(12))}
    assert all(batch.utterances > 1 and not batch.bad for batch in alone.values())
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            for window in windows_of(dataset, range(3), micro_batches=4, rank=rank, world_size=world_size):
                assert all(same(batch, alone[batch.number]) for batch in window)
                joined = join([batch.inputs for batch in window])
                assert joined.weights == tuple(batch.weight for batch in window)
                masked = joined.audio.mask_BT.sum(dim=1).split(joined.audio.utterances)
                assert all(each.unique().numel() == 1 for each in masked)
                if settings:
                    channels = joined.channel_mask_BD.sum(dim=1).split(joined.audio.utterances)
                    assert all(each.unique().numel() == 1 for each in channels)
