"""The loss that Transformers computes for the first micro-batches of a run, with the same random draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from w2vscale.config import Config
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.objectives import StepContext, build_objective
from w2vscale.objectives.contrastive import Contrastive, ContrastiveInputs


def transformers_loss(folder: Path, batches: Sequence[MicroBatch], config: Config) -> float:
    """Loss per masked frame, in training mode, without the penalty on features, which Transformers does not have.

    All utterances of a micro-batch must be equally long, and dropout off.
    """
    import transformers

    places = ("hidden", "attention", "activation", "feat_proj", "feat_quantizer")
    off: dict[str, Any] = {f"{place}_dropout": 0.0 for place in places}
    model = transformers.Wav2Vec2ForPreTraining.from_pretrained(folder, layerdrop=0.0, **off).train()
    model.quantizer.temperature = build_objective(config).settings.gumbel_start
    total, masked = 0.0, 0
    for batch in batches:
        assert not batch.inputs.audio.padded
        with patch("torch.nn.functional.gumbel_softmax", _with_our_noise(batch, config)), torch.no_grad():
            output = model(
                batch.inputs.audio.waveforms_BS,
                mask_time_indices=batch.inputs.audio.mask_BT,
                sampled_negative_indices=flat_negatives(batch.inputs),
            )
        total += float(output.loss)
        masked += batch.weight
    return total / masked


def _with_our_noise(batch: MicroBatch, config: Config) -> Any:
    """A Gumbel softmax with the noise of the micro-batch."""
    objective, inputs = build_objective(config), batch.inputs
    assert isinstance(objective, Contrastive) and isinstance(inputs, ContrastiveInputs)
    noise_MGV = objective._gumbel_noise(inputs, StepContext(config.trainer.seed, 0, (batch.number,)))
    noise_FGV = torch.zeros(inputs.audio.mask_BT.numel(), *noise_MGV.shape[1:])
    noise_FGV[inputs.audio.mask_BT.flatten()] = noise_MGV

    def gumbel_softmax(logits: Tensor, tau: float, hard: bool) -> Tensor:
        assert hard
        chosen = ((logits + noise_FGV.view(logits.shape)) / tau).argmax(dim=-1)
        return torch.nn.functional.one_hot(chosen, logits.shape[-1]).to(logits.dtype)

    return gumbel_softmax


def flat_negatives(inputs: Any) -> Tensor:
    """Our negatives, slots among the masked frames of an utterance, as Transformers has them: frames of the batch."""
    mask_BT = inputs.audio.mask_BT
    batch, frames = mask_BT.shape
    flat_BTK = torch.zeros(batch, frames, inputs.negatives_MK.shape[1], dtype=torch.long)
    for row, negatives_NK in enumerate(inputs.negatives_MK.split(list(inputs.masked))):
        frame_N = mask_BT[row].nonzero().squeeze(1)
        flat_BTK[row, frame_N] = row * frames + frame_N[negatives_NK.long()]
    return flat_BTK
