"""How much of each corpus or language an epoch holds: by weights, or by temperature (p ∝ hours^α)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from w2vscale.config.tree import MixConfig
from w2vscale.data.manifest import Corpus
from w2vscale.errors import UserError


def groups(corpus: Corpus, by: str) -> tuple[NDArray[np.int64], list[str]]:
    """The group of each utterance, and the groups' names: a manifest's path, a language, or `path/language`."""
    if by == "corpus":
        sizes = [len(manifest) for manifest in corpus.manifests]
        return np.repeat(np.arange(len(sizes)), sizes), [str(manifest.path) for manifest in corpus.manifests]
    numbers: dict[str, int] = {}
    parts = []
    for manifest in corpus.manifests:
        codes, languages = manifest.languages()
        prefix = f"{manifest.path}/" if by == "corpus/language" else ""
        names = [prefix + (language or "unknown") for language in languages]
        parts.append(np.array([numbers.setdefault(name, len(numbers)) for name in names])[codes])
    return np.concatenate(parts), list(numbers)


def draw_rates(
    group: NDArray[np.int64], names: list[str], samples: NDArray[np.int64], mix: MixConfig
) -> NDArray[np.float64]:
    """Mean number of times that an epoch draws an utterance of each group.

    `samples` are the lengths that are trained on, 0 for utterances that are left out. An epoch lasts as long as the
    corpus does; group g gets a share of it that is proportional to its weight, or to hours^temperature (Conneau et
    al. 2020, arXiv:2006.13979, section 3).

    Raises:
        UserError: the weights do not name the groups.
    """
    total = np.bincount(group, weights=samples, minlength=len(names))
    if not total.any():  # the plan says why
        return np.zeros(len(names))
    if mix.weights:
        if unknown := sorted(set(mix.weights) - set(names)):
            raise UserError(f"mix.weights: {unknown[0]}: no such {mix.by} in data.train (has: {', '.join(names)})")
        if missing := [name for name in names if name not in mix.weights]:
            raise UserError(f"mix.weights: no weight for {missing[0]}; name every {mix.by} of data.train")
        wanted = np.array([mix.weights[name] for name in names])
    else:
        wanted = total**mix.temperature
    wanted = np.where(total > 0, wanted, 0.0)
    rates: NDArray[np.float64] = wanted / wanted.sum() * total.sum() / np.maximum(total, 1.0)
    return rates
