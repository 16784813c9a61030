"""How well a checkpoint does what it learned on a set of utterances, and how it uses its codebooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from w2vscale.checkpoint.reading import load_model_weights, open_checkpoint
from w2vscale.config import load_config
from w2vscale.data.loading import (
    VALIDATION_SEED,
    MicroBatches,
    check_sample,
    loader_processes,
    make_plan,
    validation_batches,
)
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.process_group import process_group
from w2vscale.engine.base import Criterion, Sums
from w2vscale.errors import UserError
from w2vscale.evaluation.validation import validate
from w2vscale.models.build import Wav2Vec2, build_model
from w2vscale.models.layers import compute_dtype
from w2vscale.objectives.contrastive_model import LossSums
from w2vscale.objectives.criterion import CtcCriterion, PretrainingCriterion
from w2vscale.objectives.ctc_metrics import ctc_metrics
from w2vscale.objectives.pretraining_metrics import pretraining_metrics


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; `used_entries` of each codebook were chosen at least once (none in fine-tuning)."""

    checkpoint: Path
    update: int
    metrics: dict[str, float]
    used_entries: list[int]
    codebook_entries: int


def evaluate_checkpoint(
    path: Path,
    cuts: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Evaluation | None:
    """Evaluate with the checkpoint's own settings, on fixed crops, masks and negatives.

    Runs on all ranks where a launcher started several, and returns None on all but the first.

    Raises:
        UserError: the checkpoint or a manifest cannot be used, or no utterance could be read.
    """
    checkpoint = open_checkpoint(path, log)
    config = load_config(checkpoint.path / "config.yaml", overrides)
    corpus = Corpus(cuts, setting="--cuts")
    check_sample(corpus, sampling_rate=config.model.sampling_rate)
    plan = make_plan(corpus, config, seed=VALIDATION_SEED)
    dataset = MicroBatches(corpus, plan, config, seed=VALIDATION_SEED)
    with process_group() as (ranks, device), torch.no_grad(), loader_processes():
        model = build_model(config.model, config.ctc, compute_dtype(config.precision)).to(device)
        load_model_weights(checkpoint, model)
        model.eval()
        criterion: Criterion
        metrics_of: Callable[[Any], dict[str, float]]
        if config.ctc.vocabulary:
            criterion, metrics_of = CtcCriterion(config), ctc_metrics
        else:
            criterion, metrics_of = PretrainingCriterion(config.model, seed=VALIDATION_SEED), pretraining_metrics
        batches = validation_batches(dataset, config, rank=ranks.rank, world_size=ranks.world_size)
        run = partial(_evaluate, model, criterion, device)
        metrics, sums = validate(run, _counted(batches, -(-plan.per_epoch // ranks.world_size), progress), metrics_of)
    if not ranks.is_main:
        return None
    if math.isnan(metrics["loss"]):
        raise UserError(f"{cuts[0]}: no utterance could be evaluated")
    used = (sums.code_counts_GV > 0).sum(dim=1).tolist() if isinstance(sums, LossSums) else []
    return Evaluation(checkpoint.path, checkpoint.state.update, metrics, used, config.model.codebook_entries)


def _evaluate(model: Wav2Vec2, criterion: Criterion, device: torch.device, batch: MicroBatch) -> Sums:
    return criterion(model, [batch], device=device, training=False)


def _counted(
    batches: Iterator[MicroBatch], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[MicroBatch]:
    for done, batch in enumerate(batches, start=1):
        yield batch
        if progress is not None:
            progress(done, total)
