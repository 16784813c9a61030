"""Statistics of a corpus, and of the plan of one epoch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from w2vscale.config import Config
from w2vscale.data.assembly import InputMaker
from w2vscale.data.indexed import make_plan
from w2vscale.data.manifest import Corpus
from w2vscale.data.mixing import groups
from w2vscale.data.plan import Plan


@dataclass(frozen=True)
class BucketStats:
    """One bucket of the plan."""

    utterances: int
    longest_seconds: float
    per_micro_batch: int
    """Utterances in a full micro-batch."""


@dataclass(frozen=True)
class GroupStats:
    """A corpus or language of a mix."""

    name: str
    hours: float
    share: float
    """Fraction of all audio."""
    epoch_share: float
    """Fraction of the audio of an epoch."""
    draws: float
    """Average number of times that an epoch uses each utterance of the group."""


@dataclass(frozen=True)
class CorpusStats:
    """Statistics of a corpus; durations in seconds."""

    utterances: int
    hours: float
    speakers: int
    transcribed: int
    sampling_rates: dict[int, int]
    shortest: float
    median: float
    mean: float
    longest: float
    histogram: list[tuple[float, float, int, float]]  # (from, to, utterances, hours)
    left_out: int  # utterances that are too short
    buckets: list[BucketStats]
    micro_batches: int
    padding: float
    mix: list[GroupStats]


def corpus_stats(paths: Sequence[Path], config: Config, maker: InputMaker, *, bins: int = 16) -> CorpusStats:
    """Count speakers and transcripts in manifests, and plan one epoch with `config` for buckets and padding.

    Raises:
        UserError: a manifest or its index is missing, or no utterance is long enough.
    """
    corpus = Corpus(paths, setting="MANIFEST")
    durations = np.concatenate([manifest.durations for manifest in corpus.manifests])
    speakers: set[str] = set()
    rates: Counter[int] = Counter()
    transcribed = 0
    for path in paths:
        with Path(path).open(encoding="utf-8") as lines:
            for line in lines:
                if not line.strip():
                    continue
                cut = json.loads(line)
                found = cut.get("supervisions") or []
                speakers.update(s["speaker"] for s in found if s.get("speaker"))
                transcribed += any(s.get("text") for s in found)
                rates[int(cut["recording"]["sampling_rate"])] += 1
    counts, edges = np.histogram(durations, bins=bins)
    seconds, _ = np.histogram(durations, bins=edges, weights=durations)
    plan = make_plan(
        corpus,
        maker,
        model=config.model,
        data=config.data,
        batch=config.batch,
        seed=config.trainer.seed,
        mix=config.mix,
    )
    rate = config.model.sampling_rate
    return CorpusStats(
        utterances=len(corpus),
        hours=float(durations.sum()) / 3600,
        speakers=len(speakers),
        transcribed=transcribed,
        sampling_rates=dict(rates),
        shortest=float(durations.min()),
        median=float(np.median(durations)),
        mean=float(durations.mean()),
        longest=float(durations.max()),
        histogram=[
            (float(edges[i]), float(edges[i + 1]), int(counts[i]), float(seconds[i]) / 3600) for i in range(bins)
        ],
        left_out=plan.left_out,
        buckets=[BucketStats(b.count, b.longest / rate, b.per_micro_batch) for b in plan.buckets],
        micro_batches=plan.per_epoch,
        padding=plan.padding(),
        mix=_mix(corpus, plan, config) if config.mix.by != "nothing" else [],
    )


def _mix(corpus: Corpus, plan: Plan, config: Config) -> list[GroupStats]:
    """The groups of a mix, in the corpus and in one epoch."""
    group, names = groups(corpus, config.mix.by)
    seconds = np.bincount(group, weights=corpus.samples(config.model.sampling_rate)) / config.model.sampling_rate
    counts = np.bincount(group, minlength=len(names))
    utterances, lengths = plan.epoch_draws()
    drawn = np.bincount(group[utterances], weights=lengths, minlength=len(names))
    times = np.bincount(group[utterances], minlength=len(names)) / counts
    return [
        GroupStats(name, seconds[i] / 3600, seconds[i] / seconds.sum(), drawn[i] / drawn.sum(), times[i])
        for i, name in enumerate(names)
    ]
