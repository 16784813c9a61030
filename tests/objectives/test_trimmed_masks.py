"""`objective.mask_trim=micro_batch`: the masks of fairseq, and still a pure function of seed and micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.batches import config_with, dataset_of, inputs_of, same, windows_of
from tests.helpers.spelled import SPELLED, some_texts, write_spelled
from w2vscale.config import load_config
from w2vscale.data.inputs import join
from w2vscale.objectives import build_objective
from w2vscale.objectives.masking import trim

BATCHES = 2000
UNTRIMMED = 400  # batches that show that the test can tell
REFUSED_AT = 1.95 * (2 / BATCHES) ** 0.5  # two-sample Kolmogorov-Smirnov, p = 0.001


class Case(NamedTuple):
    """A preset, the frames of the utterances of a micro-batch, and what fairseq's file says about their masks."""

    preset: str
    frames: tuple[int, ...]
    probability: float
    length: int = 10
    least: int = 2
    channels: int = 0  # > 0: channels are masked, not frames
    padded: bool = True


LONG = (624, 610, 540, 470, 380, 300, 220, 160)  # 12.5 s and less
CASES = {
    "fairseq_base": Case("fairseq_base", (781,) * 5, 0.65, padded=False),  # crops of 15.6 s
    "ctc_100h": Case("ctc_100h", LONG, 0.65),
    "ctc_large_1h": Case("ctc_large_1h", LONG, 0.75),
    "utterances of about 10 frames": Case("ctc_large_100h", (9, 11, 14, 25), 0.5),
    "channels of ctc_100h": Case("ctc_100h", (20,) * 16, 0.5, 64, 0, channels=768),
    "channels of ctc_960h": Case("ctc_960h", (20,) * 16, 0.1, 64, 0, channels=768),  # 1 or 2 spans, in all rows
    "channels of XLS-R 2B": Case("ctc_xlsr", (20,) * 6, 0.25, 64, 0, channels=1920),  # 7 or 8
}


def batch_of_fairseq(case: Case, draws: np.random.Generator) -> list[NDArray[np.bool_]]:
    """The algorithm of `compute_mask_indices` with `require_same_masks`, written from its description.

    The number of spans is rounded once for all rows, or in each row if utterances are padded.
    """
    rows, masks = [case.channels] * len(case.frames) if case.channels else case.frames, []
    rounding = draws.random()
    for size in rows:
        rounding = draws.random() if case.padded and not case.channels else rounding
        count = max(case.least, int(case.probability * size / case.length + rounding))
        room = size - case.length if size - case.length > count else count + 1
        mask = np.zeros(size, dtype=np.bool_)
        for start in draws.choice(room, count, replace=False):
            mask[start : start + case.length] = True
        masks.append(mask)
    smallest = min(int(mask.sum()) for mask in masks)
    for mask in masks:
        unmasked = draws.choice(np.flatnonzero(mask), int(mask.sum()) - smallest, replace=False)
        mask[unmasked] = False
    return masks


@cache
def batches_of_ours(case: Case, trimmed: str, *overrides: str, batches: int = BATCHES) -> list[list[NDArray[np.bool_]]]:
    """What the objective of the preset masks. A convolution that makes a frame of each sample replaces the others."""
    model = [
        "model.conv_layers=[[8,1,1]]",
        "model.conv_norm_groups=8",
        f"model.dim={case.channels or 768}",
        "model.heads=12",
    ]
    objective = build_objective(load_config(case.preset, [*model, f"objective.mask_trim={trimmed}", *overrides]))
    waveforms = [np.ones(frames, dtype=np.float32) for frames in case.frames]
    targets = [[5]] * len(waveforms) if case.preset.startswith("ctc") else None
    found = []
    for number in range(batches):
        inputs = inputs_of(objective, waveforms, targets, number=number, seed=3)
        masks = inputs.channel_mask_BD if case.channels else inputs.audio.mask_BT
        found.append([row[: case.channels or frames] for row, frames in zip(masks.numpy(), case.frames, strict=True)])
    return found


def pair_of(name: str) -> list[list[list[NDArray[np.bool_]]]]:
    """Batches of a case without and with trimming."""
    return [batches_of_ours(CASES[name], "none", batches=UNTRIMMED), batches_of_ours(CASES[name], "micro_batch")]


def run_lengths(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)


def shares_and_runs(batches: Sequence[list[NDArray[np.bool_]]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of one utterance of each batch, in turn: the share that is masked, and the length of one of its runs."""
    draws, found = np.random.default_rng(0), []
    for number, masks in enumerate(batches):
        mask = masks[number % len(masks)]
        runs = run_lengths(mask)
        found.append((mask.mean(), draws.choice(runs) if runs.size else 0))
    shares, runs = np.array(found, dtype=np.float64).T
    return shares, runs


def distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The largest distance of two empirical distribution functions."""
    values = np.union1d(one, other)
    ranks = [np.searchsorted(np.sort(sample), values, side="right") / sample.size for sample in (one, other)]
    return float(np.abs(ranks[0] - ranks[1]).max())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_masks_have_the_distribution_of_fairseq(case: Case) -> None:
    draws = np.random.default_rng(1)
    theirs = shares_and_runs([batch_of_fairseq(case, draws) for _ in range(BATCHES)])
    trimmed = shares_and_runs(batches_of_ours(case, "micro_batch"))
    whole = shares_and_runs(batches_of_ours(case, "none", batches=UNTRIMMED))
    for ours, untrimmed, expected in zip(trimmed, whole, theirs, strict=True):
        assert distance(ours, expected) < REFUSED_AT
        assert distance(untrimmed, expected) > 2 * REFUSED_AT  # the test could tell


@pytest.mark.parametrize(("preset", "masked"), [("fairseq_base", 1 / 2), ("ctc_1h", 1 / 4)])
def test_the_number_of_spans_is_rounded_once_per_batch_or_in_each_padded_row(preset: str, masked: float) -> None:
    """Two rows with one or two spans each: both have two in every second batch, or in every fourth."""
    spans = ("objective.mask_probability=0.15", "objective.mask_min_spans=1")
    batches = batches_of_ours(Case(preset, (100, 100), 0.15), "micro_batch", *spans)
    share = np.mean([masks[0].sum() > 10 for masks in batches])
    assert share == pytest.approx(masked, abs=5 * (masked * (1 - masked) / BATCHES) ** 0.5)


def test_trimming_masks_less_in_shorter_runs() -> None:
    """The figures of the documentation: docs/hyperparameters.md."""
    both = pair_of("fairseq_base")
    assert [shares_and_runs(found)[0].mean() for found in both] == pytest.approx([0.4905, 0.464], abs=0.004)
    runs = [np.concatenate([run_lengths(masks[0]) for masks in found]).mean() for found in both]
    assert runs == pytest.approx([14.6, 8.5], abs=0.4)
    both = pair_of("channels of ctc_100h")
    assert [shares_and_runs(found)[0].mean() for found in both] == pytest.approx([0.404, 0.304], abs=0.01)


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
