"""Everything short of training: builds a run and takes its largest micro-batches forward and backward."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from w2vscale.config import Config
from w2vscale.data.loading import MicroBatches, check_sample, make_plan
from w2vscale.data.manifest import Corpus
from w2vscale.data.randomness import Stream, derived_seed
from w2vscale.distributed.process_group import process_group
from w2vscale.engine import build_engine
from w2vscale.engine.criterion import PretrainingCriterion
from w2vscale.errors import UserError
from w2vscale.models.layers import compute_dtype
from w2vscale.models.wav2vec2 import Wav2Vec2ForPretraining


@dataclass(frozen=True)
class DryRun:
    """What the largest forward of a run looks like."""

    parameters: dict[str, int]  # by module
    shapes: dict[str, tuple[int, ...]]
    masked_frames: int
    loss_per_frame: float
    grad_norm: float
    seconds: float
    peak_memory_bytes: int
    micro_batches_an_epoch: int


def dry_run(config: Config) -> DryRun:
    """Build data, model and engine; run `batch.concat` copies of the largest planned micro-batch and one step."""
    with process_group() as (ranks, device):
        if config.batch.micro_batches % ranks.world_size:
            raise UserError(
                f"batch.micro_batches={config.batch.micro_batches} cannot be dealt to {ranks.world_size} processes"
            )
        corpus = Corpus(config.data.train)
        check_sample(corpus, sampling_rate=config.model.sampling_rate)
        plan = make_plan(corpus, config, seed=config.trainer.seed)
        torch.manual_seed(derived_seed(config.trainer.seed, Stream.INITIALISATION))
        model = Wav2Vec2ForPretraining(config.model, compute_dtype(config.precision))
        parameters = {
            name: sum(parameter.numel() for parameter in child.parameters())
            for name, child in [*model.encoder.named_children(), *model.named_children()]
            if name != "encoder"
        }
        criterion = PretrainingCriterion(config.model, seed=config.trainer.seed)
        engine = build_engine(model, criterion, config, device)
        batch = MicroBatches(corpus, plan, config, seed=config.trainer.seed)[(0, plan.largest())]
        window = [batch] * config.batch.concat
        masked = max(batch.masked * len(window) * ranks.world_size, 1)
        began = time.perf_counter()
        sums = engine.run_window(window, torch.tensor(float(masked)))
        step = engine.step(lr=0.0, max_norm=config.optim.max_norm)
        seconds = time.perf_counter() - began
        inputs = batch.inputs
        engine.close()
    return DryRun(
        parameters=parameters,
        shapes={
            "waveforms [utterances, samples]": tuple(inputs.waveforms_BS.shape),
            "frames [utterances, frames]": tuple(inputs.mask_BT.shape),
            "negatives [masked frames, negatives]": tuple(inputs.negatives_MK.shape),
        },
        masked_frames=batch.masked,
        loss_per_frame=float(sums.total) / max(float(sums.masked), 1.0),
        grad_norm=step.grad_norm,
        seconds=seconds,
        peak_memory_bytes=_peak_memory(device),
        micro_batches_an_epoch=plan.per_epoch,
    )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
