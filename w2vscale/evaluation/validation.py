"""Validation metrics of an objective on whole manifests, over all ranks: during a run, or of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from w2vscale.checkpoint.opening import open_on_all_ranks
from w2vscale.checkpoint.reader import CheckpointReader
from w2vscale.checkpoint.remote import model_on_all_ranks
from w2vscale.data.cuts import FILES
from w2vscale.data.indexed import VALIDATION_SEED, check_sample, validation_set
from w2vscale.data.inputs import to_device
from w2vscale.data.loading import loader_processes
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import process_group, sum_over_ranks
from w2vscale.errors import UserError
from w2vscale.models.initialisation import empty_parameters
from w2vscale.objectives import Objective, StepContext, Sums, add_sums, load
from w2vscale.storage.urls import Url

WHOLE = "engine.name=ddp"
"""The override with which each rank has a whole model. In a checkpoint, ddp may be a default that nobody chose."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a checkpoint."""

    checkpoint: Path
    update: int
    weights: str  # "ema" or "raw"
    metrics: dict[str, float]
    table: dict[str, str]  # the metrics by name, formatted with their units


def evaluate_checkpoint(
    path: Path | Url,
    cuts: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    weights: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> Evaluation | None:
    """Evaluate a checkpoint with the settings it was trained with, on fixed crops, masks and negatives. Collective.

    `path` is a checkpoint folder, a run folder, to evaluate its newest intact checkpoint, or a URL; `cuts` are indexed
    manifests; `overrides` replace settings (SECTION.KEY=VALUE). Several ranks shard the model, whatever engine trained
    it, unless `overrides` contain engine.name=ddp. `weights` is "ema" or "raw": see `CheckpointReader.stored_names`.
    `progress` is called with (micro-batches begun, micro-batches in total) of this rank. Returns the evaluation on the
    first rank, None on the others.
    Raises UserError if the checkpoint or a manifest is unusable, or no utterance could be read.
    """
    with process_group() as (ranks, device), torch.no_grad(), loader_processes():
        checkpoint = open_on_all_ranks(model_on_all_ranks(path, log), log)
        # Where a manifest may have its audio is up to the caller, not to the one who made the checkpoint.
        overrides = (f"data.url_schemes=[{','.join(FILES)}]", *overrides)
        config, objective = load(checkpoint.path / "config.yaml", overrides, new=False)
        corpus = Corpus(cuts, setting="--cuts", schemes=config.data.url_schemes)
        check_sample(corpus, sampling_rate=config.model.sampling_rate)
        dataset = validation_set(corpus, objective, model=config.model, data=config.data, batch=config.batch)
        if WHOLE in overrides or ranks.world_size == 1:
            model = checkpoint.build_model(objective, device, weights=weights)
        else:
            model = _sharded(checkpoint, objective, device, weights)
        model.eval()
        if checkpoint.has_average and ranks.is_main:
            log(f"evaluating the {checkpoint.describe_weights(weights)}")
        total, numbers = -(-dataset.micro_batches // ranks.world_size), count(1)

        def evaluate(batch: MicroBatch) -> Sums:
            progress(next(numbers), total)
            step = StepContext(VALIDATION_SEED, 0, (batch.number,))
            return objective.forward(model, to_device(batch.inputs, device), step=step, training=False)

        batches = dataset.one_epoch(rank=ranks.rank, world_size=ranks.world_size)
        metrics = validate(evaluate, batches, objective.metrics)
    if not ranks.is_main:
        return None
    if not metrics["utterances"]:
        raise UserError(f"{cuts[0]}: no utterance could be evaluated")
    update, read = checkpoint.state.update, checkpoint.weights_read(weights)
    return Evaluation(checkpoint.path, update, read, metrics, objective.table(metrics))


def _sharded(checkpoint: CheckpointReader, objective: Objective, device: torch.device, weights: str | None) -> Any:
    """The model of a checkpoint, sharded over the ranks. Each reads its own shards. Collective."""
    from w2vscale.engine.fsdp import shard_for_evaluation

    with empty_parameters():
        model = objective.build_model()
    shard_for_evaluation(model, device, objective.compute_dtype)
    checkpoint.read_into(checkpoint.state_to_read(model, weights))
    return model


def validate(
    evaluate: Callable[[MicroBatch], Sums], batches: Iterable[MicroBatch], metrics: Callable[[Any], dict[str, float]]
) -> dict[str, float]:
    """Metrics over the batches of all ranks. Collective."""
    total: Any = None
    utterances = unusable = 0
    for batch in batches:
        sums = evaluate(batch)
        total = sums if total is None else add_sums(total, sums)
        utterances += batch.utterances
        unusable += sum(audio.left_out for audio in batch.bad)
    assert total is not None
    values = metrics(reduce_sums(total))
    values["utterances"], values["unusable_utterances"] = sum_over_ranks([utterances, unusable])
    return values


def reduce_sums(sums: Any) -> Any:
    """Add up sums over all ranks, in float64 on the CPU. Collective."""
    flat = torch.cat([field.detach().double().flatten().cpu() for field in sums])
    reduced = torch.tensor(sum_over_ranks(flat.tolist()), dtype=torch.float64)
    parts = reduced.split([field.numel() for field in sums])
    return type(sums)(*(part.view(field.shape) for part, field in zip(parts, sums, strict=True)))
