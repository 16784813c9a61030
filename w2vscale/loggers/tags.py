"""Names of metrics in TensorBoard, W&B and MLflow: `GROUP/KEY/SPLIT`. The part before the first slash groups charts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from w2vscale.objectives.base import Panel

GROUPS: Mapping[str, Collection[str]] = {
    "loss": {"loss", "loss_bits", "contrastive", "contrastive_bits", "diversity", "feature_penalty"},
    "accuracy": {"accuracy", "most_frequent"},
    "errors": {"label_error_rate", "wer", "blank_fraction"},
    "optim": {"lr", "temperature", "encoder_frozen", "grad_norm", "grad_norm_max"},
    "data": {"hours_seen", "masked_fraction", "padding", "masked_frames", "labels", "utterances"},
    "health": {"skipped_updates", "skipped_utterances", "skipped_windows", "unusable_utterances"},
    "speed": {
        "audio_seconds_per_second", "updates_per_second", "mfu", "data_wait_fraction", "peak_memory_gib",
        "compiled_graphs",
    },
}  # fmt: skip

CODES = ("code_perplexity_", "probability_perplexity_", "used_entries_")

BY_HOURS = "by_hours"
"""Group of the metrics whose axis is the audio seen, in seconds (an axis of TensorBoard has whole numbers)."""


@dataclass(frozen=True)
class Tags:
    """The names of an objective's metrics."""

    panels: Sequence[Panel]
    splits: Sequence[str] = ("train", "validation")
    """Those that charts show together."""

    def of(self, split: str, key: str) -> str:
        """Return the tag of a metric."""
        return f"{self.group(key)}/{key}/{split}"

    def by_hours(self, split: str, key: str) -> str | None:
        """Return the tag of a metric over the audio seen, if it is the loss or in a panel of the objective."""
        shown = key == "loss" or any(key in panel.keys for panel in self.panels)
        return f"{BY_HOURS}/{key}/{split}" if shown else None

    def group(self, key: str) -> str:
        """Return the group of a metric: from the table, or else the panel of the objective that it is in."""
        for group, keys in GROUPS.items():
            if key in keys:
                return group
        if key.startswith(CODES):
            return "codes"
        titles = [panel.title for panel in self.panels if key in panel.keys]
        return titles[0].replace(" ", "_") if titles else "other"

    def charts(self) -> dict[str, dict[str, list[str]]]:
        """Return charts that show training and all validation sets together: tags by group and key."""
        charts: dict[str, dict[str, list[str]]] = {}
        keys = ["loss", *(key for panel in self.panels if panel.training for key in panel.keys)]
        for key in dict.fromkeys(keys):
            charts.setdefault(self.group(key), {})[key] = [self.of(split, key) for split in self.splits]
        return charts
