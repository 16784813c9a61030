"""What a person would notice in the figures: collapsed codebooks, a solved pretext task, a loader that is too slow."""

from __future__ import annotations

from collections.abc import Mapping


def collapse(values: Mapping[str, float], *, codebooks: int) -> list[str]:
    """Warnings about one log line's figures of pretraining; empty where all is well."""
    warnings = []
    for codebook in range(codebooks):
        used = values[f"code_perplexity_{codebook}"]
        if used < 2.0:
            warnings.append(
                f"codebook {codebook} has collapsed: {used:.2f} entries in use. Raise model.diversity_weight, lower "
                "optim.lr, or lengthen schedule.warmup_updates"
            )
    if values["accuracy"] > 0.99 and values["contrastive"] < 0.05:
        warnings.append(
            "the contrastive task is solved (accuracy above 0.99, loss near 0): features have collapsed; "
            "the model is not learning speech"
        )
    return warnings


def slow_loading(values: Mapping[str, float]) -> list[str]:
    """A warning where updates wait for data."""
    if values["data_wait_fraction"] <= 0.3:
        return []
    return [
        f"{values['data_wait_fraction']:.0%} of the time went into waiting for data. Raise data.workers, or use "
        "faster storage"
    ]
