"""An update on more and more GPUs: the same work dealt to them, or more work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tools.bench.contenders import work_settings
from w2vscale.planning import prediction
from w2vscale.planning.fitting import per_forward, usable
from w2vscale.planning.prediction import Prediction, Setting
from w2vscale.planning.traffic import sharding_of
from w2vscale.planning.work import Model, model_of

MEASURED = Path(__file__).resolve().parents[2] / "docs" / "lab" / "2026-11-26-h100.json"
"""The only GPU that has been measured (tools/bench/gpu.py)."""


def preset_model(preset: str, settings: Sequence[str] = ()) -> Model:
    """Count the model of a pretraining preset.

    Raises:
        UserError: there is no such preset, or it is not one of wav2vec 2.0 pretraining.
    """
    return model_of(preset, work_settings(preset, settings))


def predict(model: Model, engine: str, ranks: int, micro_batches: int, setting: Setting) -> Prediction:
    """One update of `micro_batches` per GPU, with as many in a forward as fit."""
    sharding = sharding_of(engine, model, ranks, per_node=setting.cluster.gpus_per_node)
    together = per_forward(model, sharding, micro_batches, usable(setting.cluster.memory))
    return prediction.predict(model, sharding, micro_batches, per_forward=together, setting=setting)


def dealt(model: Model, engine: str, gpus: Sequence[int], setting: Setting) -> list[Prediction]:
    """The preset's update dealt to more and more GPUs, as long as each has a micro-batch (strong scaling)."""
    total = model.config.batch.micro_batches
    return [predict(model, engine, ranks, total // ranks, setting) for ranks in gpus if total % ranks == 0]


def added(model: Model, engine: str, gpus: Sequence[int], micro_batches: int, setting: Setting) -> list[Prediction]:
    """Updates that grow with the GPUs: `micro_batches` on each (weak scaling)."""
    return [predict(model, engine, ranks, micro_batches, setting) for ranks in gpus]


def efficiency(prediction: Prediction, setting: Setting) -> float:
    """Audio per second and GPU, relative to one GPU that runs the preset's whole update in long forwards."""
    model = prediction.model
    alone = predict(model, "ddp", 1, model.config.batch.micro_batches, setting)
    return prediction.audio_per_second / prediction.ranks / alone.audio_per_second


def enough(model: Model, engine: str, ranks: int, setting: Setting) -> int | None:
    """The fewest micro-batches per GPU (a power of two up to 512) that give an efficiency of 90 %: more help little."""
    for micro_batches in (2**power for power in range(10)):
        if efficiency(predict(model, engine, ranks, micro_batches, setting), setting) >= 0.9:
            return micro_batches
    return None
