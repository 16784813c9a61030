"""Mixing corpora or languages in an epoch, by weights or by temperature (p ∝ hours^α)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from w2vscale.config.tree import MixConfig
from w2vscale.data.manifest import Corpus
from w2vscale.errors import UserError


def groups(corpus: Corpus, by: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return the group of each utterance, and the name of each group: manifest path, language, or `path/language`."""
    numbers: dict[str, int] = {}
    parts = []
    for manifest in corpus.manifests:
        codes, languages = manifest.languages()
        names = [language or "unknown" for language in languages]
        if by != "language":
            names = [str(manifest.path) if by == "corpus" else f"{manifest.path}/{name}" for name in names]
        parts.append(np.array([numbers.setdefault(name, len(numbers)) for name in names])[codes])
    return np.concatenate(parts), list(numbers)


def draw_rates(
    group: NDArray[np.int64], names: list[str], samples: NDArray[np.int64], mix: MixConfig
) -> NDArray[np.float64]:
    """Return how often, on average, an epoch draws an utterance of each group.

    `samples` are the lengths after cropping, 0 for utterances that are left out. An epoch has as much audio as the
    corpus. The share of a group is proportional to its weight, or to hours^temperature (Conneau et al. 2020,
    arXiv:2006.13979, section 3). Raises UserError if `mix.weights` names an unknown group or lacks one.
    """
    total = np.bincount(group, weights=samples, minlength=len(names))
    if not total.any():  # `Plan` raises the error
        return np.zeros(len(names))
    wanted = total**mix.temperature
    if mix.weights:
        if unknown := sorted(set(mix.weights) - set(names)):
            raise UserError(f"mix.weights: {unknown[0]}: no such {mix.by} in data.train (has: {', '.join(names)})")
        if missing := [name for name in names if name not in mix.weights]:
            raise UserError(f"mix.weights: no weight for {missing[0]}; name every {mix.by} of data.train")
        wanted = np.array([mix.weights[name] for name in names])
    wanted = np.where(total > 0, wanted, 0.0)
    rates: NDArray[np.float64] = wanted / wanted.sum() * total.sum() / np.maximum(total, 1.0)
    return rates
