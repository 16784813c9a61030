"""An objective's forward: joins micro-batches and gives the model every random draw, from the one integer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from w2vscale.config import Config, ModelConfig
from w2vscale.data.inputs import concatenate, concatenate_ctc, to_device
from w2vscale.data.micro_batch import MicroBatch, gumbel_noise
from w2vscale.data.randomness import Stream, derived_seed, generator
from w2vscale.objectives.contrastive_model import LossSums
from w2vscale.objectives.ctc import CtcSums
from w2vscale.optim.schedules import gumbel_temperature


class PretrainingCriterion:
    """Contrastive pretraining (Baevski et al. 2020) of micro-batches that share one forward."""

    def __init__(self, config: ModelConfig, *, seed: int) -> None:
        self.config = config
        self.seed = seed

    def __call__(
        self, module: nn.Module, chunk: Sequence[MicroBatch], *, device: torch.device, training: bool
    ) -> LossSums:
        """Loss sums of `chunk` on `device`; without `training`, codes are the argmax and every layer runs."""
        # Joined there: a joined copy here would no longer be in pinned memory.
        inputs = concatenate([to_device(batch.inputs, device) for batch in chunk])
        if not training:
            return module(inputs)
        first = chunk[0]
        torch.manual_seed(derived_seed(self.seed, Stream.DROPOUT, first.number))
        return module(
            inputs,
            noise_MGV=gumbel_noise(chunk, seed=self.seed, config=self.config, device=device),
            temperature=gumbel_temperature(first.update, self.config),
            active=active_layers(first.update, self.config, seed=self.seed),
        )


class CtcCriterion:
    """Fine-tuning by connectionist temporal classification."""

    def __init__(self, config: Config) -> None:
        self.model = config.model
        self.ctc = config.ctc
        self.seed = config.trainer.seed

    def __call__(
        self, module: nn.Module, chunk: Sequence[MicroBatch], *, device: torch.device, training: bool
    ) -> CtcSums:
        """Loss sums of `chunk` on `device`; without `training`, nothing is masked, and errors are counted."""
        inputs = concatenate_ctc([to_device(batch.inputs, device) for batch in chunk])
        if not training:
            return module(inputs)
        first = chunk[0]
        torch.manual_seed(derived_seed(self.seed, Stream.DROPOUT, first.number))
        return module(
            inputs,
            active=active_layers(first.update, self.model, seed=self.seed),
            frozen=first.update < self.ctc.freeze_encoder_updates,
        )


def active_layers(update: int, config: ModelConfig, *, seed: int) -> list[bool] | None:
    """Which layers update `update` computes (LayerDrop): the same on all ranks."""
    if config.layerdrop == 0.0:
        return None
    return list(generator(seed, Stream.LAYERDROP, update).random(config.layers) >= config.layerdrop)
