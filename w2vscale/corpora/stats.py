"""Statistics of a corpus, and of the plan of one epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from w2vscale.config import Config
from w2vscale.data.assembly import InputMaker
from w2vscale.data.indexed import make_plan
from w2vscale.data.manifest import Corpus
from w2vscale.data.mixing import groups
from w2vscale.data.plan import Plan
from w2vscale.storage.urls import Url


class GroupStats(NamedTuple):
    """A corpus or language of a mix."""

    name: str
    hours: float
    share: float  # of all audio
    epoch_share: float  # of the audio of an epoch
    draws: float  # of each utterance of the group in an epoch, on average


@dataclass(frozen=True)
class CorpusStats:
    """Statistics of a corpus, and its plan."""

    durations: NDArray[np.float64]  # of each utterance, in seconds
    speakers: int
    transcribed: int  # utterances with a transcript
    sampling_rates: dict[int, int]  # number of utterances by sampling rate in Hz
    plan: Plan
    mix: list[GroupStats]

    @property
    def median(self) -> float:
        """Median duration in seconds."""
        return float(np.median(self.durations))

    def histogram(self, bins: int = 16) -> list[tuple[float, float, int, float]]:
        """Equally wide ranges of durations: from, to (in seconds), utterances, hours."""
        counts, edges = np.histogram(self.durations, bins)
        hours, _ = np.histogram(self.durations, edges, weights=self.durations / 3600)
        return list(zip(edges[:-1], edges[1:], counts, hours, strict=True))


def corpus_stats(
    paths: Sequence[Path | Url], config: Config, maker: InputMaker, *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CorpusStats:  # fmt: skip
    """Count speakers and transcripts in manifests, and plan one epoch with `config` for buckets and padding.

    Raises UserError if a manifest or its index is missing, or no utterance is long enough.
    """
    corpus = Corpus(paths, setting="MANIFEST", schemes=config.data.url_schemes)
    speakers: set[str] = set()
    rates: Counter[int] = Counter()
    transcribed = 0
    done = count()
    for manifest in corpus.manifests:
        for number in range(len(manifest)):
            progress(next(done), len(corpus))
            cut = manifest.read(number, dict)
            supervisions = cut.get("supervisions") or []
            speakers.update(s["speaker"] for s in supervisions if s.get("speaker"))
            transcribed += any(s.get("text") for s in supervisions)
            rates[int(cut["recording"]["sampling_rate"])] += 1
    model, data, batch, seed = config.model, config.data, config.batch, config.trainer.seed
    plan = make_plan(corpus, maker, model=model, data=data, batch=batch, seed=seed, mix=config.mix)
    mix = _mix(corpus, plan, config) if config.mix.by != "nothing" else []
    return CorpusStats(corpus.durations, len(speakers), transcribed, dict(rates), plan, mix)


def _mix(corpus: Corpus, plan: Plan, config: Config) -> list[GroupStats]:
    """The groups of a mix, in the corpus and in one epoch."""
    group, names = groups(corpus, config.mix.by)
    hours = np.bincount(group, weights=corpus.durations) / 3600
    utterances, lengths = plan.epoch_draws()
    drawn = np.bincount(group[utterances], weights=lengths, minlength=len(names))
    times = np.bincount(group[utterances], minlength=len(names)) / np.bincount(group, minlength=len(names))
    columns = names, hours, hours / hours.sum(), drawn / drawn.sum(), times
    return [GroupStats(*row) for row in zip(*columns, strict=True)]
