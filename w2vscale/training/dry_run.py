"""Everything short of training: builds a run and takes its largest micro-batch forward and backward."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from w2vscale.config import Config
from w2vscale.data.inputs import CtcInputs, PretrainingInputs
from w2vscale.distributed.process_group import process_group
from w2vscale.engine import build_engine
from w2vscale.engine.memory import lack_of_memory_told
from w2vscale.objectives.objective import build_objective, with_every_layer
from w2vscale.training.run import empty_model, initial_values, open_data


@dataclass(frozen=True)
class DryRun:
    """What the largest forward of a run looks like."""

    parameters: dict[str, int]  # by module
    shapes: dict[str, tuple[int, ...]]
    weight: int
    """Masked frames, or labels in fine-tuning."""
    loss: float
    grad_norm: float
    seconds: float
    peak_memory_bytes: int
    micro_batches_an_epoch: int | None


def dry_run(config: Config) -> DryRun | None:
    """Build data, model and engine; accumulate the largest planned micro-batch twice, and step.

    Twice, and with every layer: what needs most memory is a forward beside the gradients of an earlier one.
    Returns None on all ranks but the first.
    """
    with process_group(needed=config.engine.name != "ddp") as (ranks, device):
        training_set, _ = open_data(config, ranks)
        model = empty_model(config)
        parameters = {
            name: sum(parameter.numel() for parameter in child.parameters())
            for name, child in [*model.encoder.named_children(), *model.named_children()]
            if name != "encoder"
        }
        parameters["mask_embedding"] = model.encoder.mask_embedding.numel()
        engine = build_engine(model, build_objective(with_every_layer(config)).criterion, config, device)
        engine.import_parameters(initial_values(config))
        batch = training_set.largest()
        window = [batch] * (2 if config.batch.concat == "auto" else 2 * config.batch.concat)
        masked = max(batch.weight * len(window) * ranks.world_size, 1)
        began = time.perf_counter()
        with lack_of_memory_told(config):
            sums = engine.run_window(window, torch.tensor(float(masked)))
            step = engine.step(lr=0.0, max_norm=config.optim.max_norm)
        seconds = time.perf_counter() - began
        inputs = batch.inputs
        engine.close()
    if not ranks.is_main:
        return None
    return DryRun(
        parameters=parameters,
        shapes={
            "waveforms [utterances, samples]": tuple(inputs.waveforms_BS.shape),
            "frames [utterances, frames]": tuple(inputs.mask_BT.shape),
            **_targets(inputs),
        },
        weight=batch.weight,
        loss=float(sums.total) / max(batch.weight * len(window), 1),
        grad_norm=step.grad_norm,
        seconds=seconds,
        peak_memory_bytes=_peak_memory(device),
        micro_batches_an_epoch=training_set.micro_batches,
    )


def _targets(inputs: PretrainingInputs | CtcInputs) -> dict[str, tuple[int, ...]]:
    if isinstance(inputs, CtcInputs):
        return {"labels": tuple(inputs.labels_L.shape)}
    return {"negatives [masked frames, negatives]": tuple(inputs.negatives_MK.shape)}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
