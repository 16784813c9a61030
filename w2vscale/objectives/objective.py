"""What a run learns, and how its figures read: all of training that differs between pretraining and fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from w2vscale.config import Config
from w2vscale.engine.base import Criterion
from w2vscale.objectives.contrastive_model import LossSums
from w2vscale.objectives.criterion import CtcCriterion, PretrainingCriterion
from w2vscale.objectives.ctc import CtcSums
from w2vscale.objectives.ctc_metrics import ctc_metrics
from w2vscale.objectives.pretraining_metrics import pretraining_metrics
from w2vscale.optim.schedules import gumbel_temperature
from w2vscale.training.watchdog import collapse


class Objective(Protocol):
    """One kind of training."""

    criterion: Criterion

    def metrics(self, sums: Any) -> dict[str, float]:
        """Figures from sums over all ranks."""

    def scheduled(self, update: int) -> dict[str, float]:
        """What follows from the update alone, beside the learning rate."""

    def line(self, values: Mapping[str, float]) -> str:
        """The figures that a person wants to see."""

    def diagnose(self, values: Mapping[str, float]) -> list[str]:
        """Warnings about one log line's figures."""


class Pretraining:
    """Contrastive prediction of masked frames."""

    def __init__(self, config: Config) -> None:
        self.model = config.model
        self.criterion: Criterion = PretrainingCriterion(config.model, seed=config.trainer.seed)

    def metrics(self, sums: LossSums) -> dict[str, float]:
        """See `Objective.metrics`."""
        return pretraining_metrics(sums)

    def scheduled(self, update: int) -> dict[str, float]:
        """See `Objective.scheduled`."""
        return {"temperature": gumbel_temperature(update, self.model)}

    def line(self, values: Mapping[str, float]) -> str:
        """See `Objective.line`."""
        codes = "/".join(f"{values[f'code_perplexity_{codebook}']:.0f}" for codebook in range(self.model.codebooks))
        return (
            f"loss {values['loss']:.3f}  contrastive {values['contrastive_bits']:.3f} bits"
            f"  accuracy {values['accuracy']:.3f}  codes {codes}"
        )

    def diagnose(self, values: Mapping[str, float]) -> list[str]:
        """See `Objective.diagnose`."""
        return collapse(values, codebooks=self.model.codebooks)


class FineTuning:
    """Connectionist temporal classification of transcripts."""

    def __init__(self, config: Config) -> None:
        self.frozen_updates = config.ctc.freeze_encoder_updates
        self.criterion: Criterion = CtcCriterion(config)

    def metrics(self, sums: CtcSums) -> dict[str, float]:
        """See `Objective.metrics`."""
        return ctc_metrics(sums)

    def scheduled(self, update: int) -> dict[str, float]:
        """See `Objective.scheduled`."""
        return {"encoder_frozen": float(update < self.frozen_updates)}

    def line(self, values: Mapping[str, float]) -> str:
        """See `Objective.line`."""
        errors = values["label_error_rate"]
        return f"loss {values['loss']:.3f} a label" + (f"  label errors {errors:.1%}" if "utterances" in values else "")

    def diagnose(self, values: Mapping[str, float]) -> list[str]:
        """See `Objective.diagnose`."""
        return []


def build_objective(config: Config) -> Objective:
    """Fine-tuning where there is a vocabulary, otherwise pretraining."""
    return FineTuning(config) if config.ctc.vocabulary else Pretraining(config)


def with_every_layer(config: Config) -> Config:
    """The settings, but every layer is computed and learns from the first update on: what needs most memory."""
    model = config.model.model_copy(update={"layerdrop": 0.0})
    return config.model_copy(
        update={"model": model, "ctc": config.ctc.model_copy(update={"freeze_encoder_updates": 0})}
    )
