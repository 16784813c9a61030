"""Whether all ranks are about to do the same work. Ranks that disagree would hang, or compute nonsense silently."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy
import torch

from w2vscale.checkpoint.format import TrainState
from w2vscale.config import Config, dump_config
from w2vscale.distributed.process_group import gather_from_ranks
from w2vscale.engine.deepspeed.config import deepspeed_config
from w2vscale.errors import UserError
from w2vscale.objectives import StepContext
from w2vscale.version import __version__


def planned_work(config: Config, state: TrainState) -> dict[str, str]:
    """The next update, the window that it uses and the layers that it computes (LayerDrop)."""
    step = StepContext(config.trainer.seed, state.update)
    layers = step.active_layers(config.model.layers, config.regularization.layerdrop)
    return {
        "the update": str(state.update),
        "the window": str(state.window),
        "the layers to compute": "all" if layers is None else "".join(str(int(active)) for active in layers),
    }


def common_ground(config: Config, data: str) -> dict[str, str]:
    """What all work of a run follows from, `data` being a description of the training set. Paths may differ."""
    without_paths: dict[str, dict[str, object]] = {
        "data": {"train": [], "validation": [], "validation_sets": {name: [] for name in config.data.validation_sets}},
        "augment": {"noise": [Path()] * len(config.augment.noise), "reverb": [Path()] * len(config.augment.reverb)},
        "mix": {"weights": {str(place): weight for place, weight in enumerate(config.mix.weights.values())}},
    }
    anywhere = config.model_copy(
        update={section: getattr(config, section).model_copy(update=blank) for section, blank in without_paths.items()}
    )
    document = None
    if config.engine.name == "deepspeed":
        document = deepspeed_config(config.engine, config.optim, config.precision)
    return {
        "the settings": _digest(dump_config(anywhere)),
        "the JSON for DeepSpeed": _digest(json.dumps(document)),
        "the data": data,
        "the version of w2vscale": __version__,
        "the version of torch": torch.__version__,
        "the version of numpy": numpy.__version__,
        "the version of Python": platform.python_version(),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare_ranks(work: Mapping[str, str]) -> None:
    """Compare on all ranks. Raises UserError on every rank if they differ, with the first difference. Collective."""
    of_ranks = gather_from_ranks(dict(work))
    for fact, here in of_ranks[0].items():
        others = {rank: of_rank.get(fact) for rank, of_rank in enumerate(of_ranks) if of_rank.get(fact) != here}
        if others:
            rank, there = next(iter(others.items()))
            also = f" (and {len(others) - 1} more ranks)" if len(others) > 1 else ""
            raise UserError(
                f"the ranks disagree on {fact}: rank 0 has {here}, rank {rank} has {there}{also}; start all of them "
                "with the same settings and versions"
            )
