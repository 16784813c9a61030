"""What a run shows when it starts: the devices, engine, model, data and length."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from w2vscale.config import LoggingConfig
from w2vscale.data.indexed import MicroBatches
from w2vscale.data.loading import TrainingData
from w2vscale.distributed.process_group import gather_from_ranks
from w2vscale.errors import counted
from w2vscale.hardware import device_name
from w2vscale.objectives.base import empty_model
from w2vscale.planning.exposure import Exposure, exposure
from w2vscale.training.planning import corpus_of
from w2vscale.training.run import Run
from w2vscale.version import __version__

LARGE_CORPUS = 1_000_000
"""Utterances above which the padding of an epoch is not computed: it would take seconds."""

NAMED_HOSTS = 4


@dataclass(frozen=True)
class Amount:
    """The audio of one epoch of a corpus."""

    hours: float
    utterances: int
    padding: float | None  # fraction of the padded samples; None: not computed

    def __str__(self) -> str:
        padding = "" if self.padding is None else f", {self.padding:.1%} padding"
        return f"{hours(self.hours)} in {counted(self.utterances, 'utterance')}{padding}"


@dataclass(frozen=True)
class Start:
    """What a run is, when it starts or resumes."""

    exp: str
    update: int  # at which it resumes; 0: a new run
    seed: int
    hosts: tuple[str, ...]
    ranks: int
    devices: tuple[tuple[str, int], ...]  # name of a GPU or processor, and number of them
    engine: str
    compiled: bool
    precision: str
    objective: str
    layers: int
    dim: int
    parameters: int
    trained_parameters: int
    training: Amount
    validation: Amount | None
    micro_batches: int  # per update
    max_seconds: float  # of a micro-batch
    per_forward: int
    series: int
    exposure: Exposure
    tracking: Sequence[str]  # services that the run is logged to

    @property
    def devices_in_words(self) -> str:
        """The devices and their number."""
        return ", ".join(f"{count} × {name}" for name, count in self.devices)

    @property
    def hosts_in_words(self) -> str:
        """The names of the hosts, or their number and the first name."""
        if len(self.hosts) <= NAMED_HOSTS:
            return ", ".join(self.hosts)
        return f"{len(self.hosts)} hosts (the first is {self.hosts[0]})"

    def rows(self) -> list[tuple[str, str]]:
        """Return what to show: pairs of a name and a text."""
        frozen = self.parameters - self.trained_parameters
        epochs, amount = self.exposure.epochs or 0.0, self.exposure.hours
        return [
            ("run", f"{self.exp}, {f'from update {self.update:,}' if self.update else 'new'}, seed {self.seed}"),
            ("devices", f"{self.devices_in_words}, on {self.hosts_in_words}"),
            (
                "engine",
                f"{self.engine} on {counted(self.ranks, 'rank')}, {self.precision}{', compiled' * self.compiled}",
            ),
            (
                "model",
                f"{self.objective}, {counted(self.layers, 'block')} of width {self.dim:,}, {self.parameters:,} "
                f"parameters{f', {frozen:,} of them frozen' * bool(frozen)}",
            ),
            ("data", str(self.training)),
            *([("validation", str(self.validation))] if self.validation else []),
            (
                "update",
                f"{counted(self.micro_batches, 'micro-batch')} of up to {self.max_seconds:g} s, in series of "
                f"{self.series}; {self.per_forward} per forward",
            ),
            (
                "length",
                f"{counted(self.exposure.updates, 'update')}, {significant(epochs)} epochs, {hours(amount)} of audio",
            ),
            *([("tracking", ", ".join(self.tracking))] if self.tracking else []),
        ]

    def event(self) -> dict[str, Any]:
        """Return the values for the event `start` of `logs/events.jsonl`."""
        training = self.training
        return {
            "host": self.hosts_in_words,
            "devices": self.devices_in_words,
            "processes": self.ranks,
            "engine": self.engine,
            "objective": self.objective,
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "training": {"hours": training.hours, "utterances": training.utterances, "padding": training.padding},
            "validation": str(self.validation) if self.validation else "",
            "updates": self.exposure.updates,
            "epochs": self.exposure.epochs,
            "w2vscale": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }


def describe_start(run: Run, per_forward: int) -> Start:
    """Describe a run that is built. Collective."""
    config = run.config
    parameters = [(one.numel(), one.requires_grad) for one in empty_model(run.objective).parameters()]
    return Start(
        exp=str(run.exp),
        update=run.state.update,
        seed=config.trainer.seed,
        hosts=tuple(dict.fromkeys(gather_from_ranks(socket.gethostname()))),
        ranks=run.ranks.world_size,
        devices=_devices(run.device),
        engine=_engine(run),
        compiled=run.engine.compiled,
        precision=config.precision.compute,
        objective=config.objective.name,
        layers=config.model.layers,
        dim=config.model.dim,
        parameters=sum(size for size, _ in parameters),
        trained_parameters=sum(size for size, trained in parameters if trained),
        training=_amount(run.training_set),
        validation=_amount(run.validation_set) if run.validation_set is not None else None,
        micro_batches=config.batch.micro_batches,
        max_seconds=config.batch.max_seconds,
        per_forward=per_forward,
        series=run.training_set.series_length,
        exposure=exposure(config, corpus_of(run.training_set)),
        tracking=tracking(config.logging),
    )


def tracking(logging: LoggingConfig) -> list[str]:
    """The services that a run is logged to, in words."""
    offline = " (offline)" if os.environ.get("WANDB_MODE") == "offline" else ""
    services = [f"W&B project {logging.wandb}{offline}"] if logging.wandb else []
    return services + ([f"MLflow {logging.mlflow}"] if logging.mlflow else [])


def hours(number: float) -> str:
    """An amount of audio, in hours whatever it is, so that lines can be compared."""
    return f"{significant(number)} h"


def significant(number: float) -> str:
    """Three significant digits, or all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _amount(data: TrainingData | MicroBatches) -> Amount:
    padding = data.padding() if data.utterances <= LARGE_CORPUS else None
    return Amount(data.hours, data.utterances, padding)


def _devices(device: torch.device) -> tuple[tuple[str, int], ...]:
    """Count devices by name. Ranks on the CPU of a host share it. Collective."""
    threads = "" if device.type == "cuda" else f" ({counted(torch.get_num_threads(), 'thread')} per rank)"
    places = gather_from_ranks((socket.gethostname(), str(device), device_name(device) + threads))
    return tuple(Counter(name for _, _, name in dict.fromkeys(places)).items())


def _engine(run: Run) -> str:
    engine = run.config.engine
    return f"deepspeed {engine.deepspeed_config}" if engine.name == "deepspeed" else engine.name
