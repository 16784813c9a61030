"""Transformers' loss of the micro-batches that a run of ours begins with, with the same random draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from w2vscale.config import Config
from w2vscale.data.micro_batch import MicroBatch, gumbel_noise


def transformers_loss(folder: Path, batches: Sequence[MicroBatch], config: Config) -> float:
    """Loss per masked frame, in training mode, without the penalty on features, which Transformers does not have.

    All utterances of a micro-batch must be equally long, and dropout off.
    """
    import transformers

    places = ("hidden", "attention", "activation", "feat_proj", "feat_quantizer")
    off = {f"{place}_dropout": 0.0 for place in places}
    model = transformers.Wav2Vec2ForPreTraining.from_pretrained(folder, layerdrop=0.0, **off).train()
    model.quantizer.temperature = config.objective.gumbel_start
    total, masked = 0.0, 0
    for batch in batches:
        assert not batch.inputs.padded
        with patch("torch.nn.functional.gumbel_softmax", _with_our_noise(batch, config)), torch.no_grad():
            output = model(
                batch.inputs.waveforms_BS,
                mask_time_indices=batch.inputs.mask_BT,
                sampled_negative_indices=flat_negatives(batch.inputs),
            )
        total += float(output.loss)
        masked += batch.weight
    return total / masked


def _with_our_noise(batch: MicroBatch, config: Config) -> Any:
    """What draws from the generator of (seed, micro-batch) instead of PyTorch's."""
    noise_MGV = gumbel_noise([batch], seed=config.trainer.seed, config=config.model, device=torch.device("cpu"))
    frames, codebooks = batch.inputs.mask_BT.numel(), config.objective.codebooks
    noise_FGV = torch.zeros(frames, codebooks, config.objective.codebook_entries)
    noise_FGV[batch.inputs.mask_BT.flatten()] = noise_MGV

    def gumbel_softmax(logits: Tensor, tau: float, hard: bool) -> Tensor:
        assert hard
        chosen = ((logits + noise_FGV.view(logits.shape)) / tau).argmax(dim=-1)
        return torch.nn.functional.one_hot(chosen, logits.shape[-1]).to(logits.dtype)

    return gumbel_softmax


def flat_negatives(inputs: Any) -> Tensor:
    """Our negatives (numbers among an utterance's masked frames) as Transformers' (frames of the flattened batch)."""
    batch, frames = inputs.mask_BT.shape
    flat_BTK = torch.zeros(batch, frames, inputs.negatives_MK.shape[1], dtype=torch.long)
    for row, mask_T in enumerate(inputs.mask_BT):
        frame_N = mask_T.nonzero().squeeze(1)
        flat_BTK[row, frame_N] = row * frames + frame_N[inputs.negatives_MK[inputs.utterance_M == row].long()]
    return flat_BTK
