"""`w2vscale plan`: plan a run from its settings and from its corpus, if they name one. Also what `--dry-run` shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from w2vscale.config import Config
from w2vscale.data.loading import TrainingData
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.distributed.launch import local_processes
from w2vscale.errors import UserError
from w2vscale.objectives import load
from w2vscale.planning.exposure import Corpus, unusual_epochs
from w2vscale.planning.fake_pass import DeviceType
from w2vscale.planning.links import Cluster
from w2vscale.planning.memory import demand
from w2vscale.planning.plan import Plan, make_plan
from w2vscale.planning.rates import measured_rates
from w2vscale.planning.traffic import sharding_by
from w2vscale.planning.work import model_of
from w2vscale.training.run import open_training_set


def plan_run(
    source: str, overrides: Sequence[str], *, gpus: int, nodes: int | None, cluster: Cluster, rates: Path | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Plan, str | None]:  # fmt: skip
    """Plan the run that `source` and `overrides` describe on the GPUs of `cluster`; also a warning about its epochs.

    Nodes have as many GPUs as those of the cluster, unless `nodes` says how many there are.
    `rates`: a result of tools/bench/gpu.py, which replaces the computing speed of the cluster.
    Raises UserError if the settings, the corpus, the numbers or the file cannot be used.
    """
    config, objective = load(source, overrides)
    measured = None if rates is None else measured_rates(rates)
    corpus = corpus_of(open_training_set(config, objective)) if config.data.train else None
    count = -(-gpus // cluster.gpus_per_node) if nodes is None else nodes
    plan = make_plan(
        Path(source).stem, config, objective,
        gpus=gpus, nodes=count, cluster=cluster, measured=measured, corpus=corpus, progress=progress,
    )  # fmt: skip
    return plan, None if corpus is None else unusual_epochs(config, objective, corpus)


def corpus_of(training_set: TrainingData) -> Corpus:
    """Return what an epoch of a training set has."""
    return Corpus(training_set.hours, training_set.micro_batches)


def predicted_peak(
    config: Config, largest: MicroBatch, *, per_forward: int, forwards: int, world_size: int, device: torch.device
) -> float | None:
    """Predict the bytes of the tensors of a rank in updates of `forwards` forwards of the largest micro-batch.

    Returns None if they cannot be predicted: the objective does not run with fake tensors, or has several encoders.
    """
    utterances, samples = largest.inputs.audio.waveforms_BS.shape
    seconds = samples / config.model.sampling_rate
    data = config.data.model_copy(update={"max_seconds": seconds, "min_seconds": min(config.data.min_seconds, seconds)})
    kind: DeviceType = "cuda" if device.type == "cuda" else "cpu"
    try:
        model = model_of("", config.model_copy(update={"data": data}), device=kind)
        sharding = sharding_by(config, world_size, per_node=local_processes(os.environ) or world_size)
        return demand(model, sharding, forwards=forwards).footprint(utterances * per_forward).total
    except UserError:
        return None
