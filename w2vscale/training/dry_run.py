"""`--dry-run`: build a run and compute its largest forward, without training."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch

from w2vscale.config import Config
from w2vscale.data.inputs import join, tensors_of, to_device
from w2vscale.distributed.process_group import process_group
from w2vscale.engine import build_engine
from w2vscale.engine.memory import explain_oom
from w2vscale.hardware import memory_used
from w2vscale.objectives import StepContext, resolve
from w2vscale.objectives.base import empty_model, initial_state
from w2vscale.planning.exposure import Exposure, exposure, unusual_epochs
from w2vscale.training.calibration import forward_size
from w2vscale.training.planning import corpus_of, predicted_peak
from w2vscale.training.run import log_advice, log_targets, open_data


@dataclass(frozen=True)
class DryRun:
    """Sizes, time and memory of the largest forward, which has copies of the largest micro-batch."""

    parameters: dict[str, int]  # number of parameters of each module
    shapes: dict[str, tuple[int, ...]]  # of each input tensor, by names that include the shape suffix
    per_series: int  # number of consecutive micro-batches of the same bucket
    per_forward: int  # number of micro-batches that share a forward
    forwards: int  # number of forwards that were run
    weight: int  # contribution of a forward to the loss denominator: masked frames, or labels
    loss: float  # nats per unit of weight
    grad_norm: float
    seconds: float
    compiled: bool  # whether the time includes compilation
    peak_memory_bytes: int
    predicted_bytes: float | None  # of tensors of this rank, as `w2vscale plan` predicts them; None if it cannot
    micro_batches_per_epoch: int
    exposure: Exposure


def dry_run(config: Config, log: Callable[[str], None] = lambda text: None) -> DryRun | None:
    """Build data, model and engine, run the largest forward, and step with a learning rate of 0.

    The forward runs twice if a rank has two per update, because memory then peaks in the second one, when the gradients
    of the first exist. All layers are active. With `batch.concat=auto`, a GPU measures how many micro-batches fit
    into a forward. Rank 0 logs, and returns the result; the others return None.
    """
    with process_group(needed=config.engine.name != "ddp") as (ranks, device):
        if not ranks.is_main:
            log = lambda text: None  # noqa: E731
        config, objective = resolve(config)
        objective.check(config)
        training_set, _ = open_data(config, objective, ranks)
        log_targets(training_set, objective, ranks, log)
        model = empty_model(objective)
        parameters = {
            name: sum(parameter.numel() for parameter in child.parameters())
            for name, child in [*model.encoder.named_children(), *model.named_children()]
            if name != "encoder"
        }
        parameters["mask_embedding"] = model.encoder.mask_embedding.numel()
        with closing(build_engine(model, config, objective, device)) as engine:
            engine.import_values(initial_state(objective, config.trainer.seed))
            log_advice(config, objective, training_set, engine, device, log)
            batch = training_set.largest()
            with explain_oom(config.batch):
                per_forward = forward_size(
                    config.batch, engine, objective, training_set,
                    world_size=ranks.world_size, device=device, log=log,
                )  # fmt: skip
                window = [batch] * min(2 * per_forward, config.batch.micro_batches // ranks.world_size)
                weight = max(batch.weight * len(window) * ranks.world_size, 1)
                began = time.perf_counter()
                sums = engine.run_window(
                    window, objective, StepContext(config.trainer.seed, 0, worst_case=True),
                    per_forward=per_forward, denominator=torch.tensor(float(weight)),
                )  # fmt: skip
                norm = engine.step(lr=0.0, max_norm=config.optim.max_norm)
            seconds = time.perf_counter() - began
    if not ranks.is_main:
        return None
    peak, forwards, corpus = memory_used(device), -(-len(window) // per_forward), corpus_of(training_set)
    if (warning := unusual_epochs(config, objective, corpus)) is not None:
        log(f"warning: {warning}")
    inputs = join([to_device(batch.inputs, torch.device("meta"))] * per_forward)
    return DryRun(
        parameters=parameters,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors_of(inputs)},
        per_series=training_set.series_length,
        per_forward=per_forward,
        forwards=forwards,
        weight=batch.weight * per_forward,
        loss=float(sums.total) / max(batch.weight * len(window), 1),
        grad_norm=float(norm),
        seconds=seconds,
        compiled=engine.compiled,
        peak_memory_bytes=peak,
        predicted_bytes=predicted_peak(
            config,
            batch,
            per_forward=per_forward,
            forwards=forwards,
            world_size=ranks.world_size,
            device=device,
        ),
        micro_batches_per_epoch=training_set.micro_batches,
        exposure=exposure(config, corpus),
    )
