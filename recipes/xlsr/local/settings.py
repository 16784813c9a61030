"""Print settings of one source that another one has not, as SECTION.KEY=VALUE: settings.py KIND OTHER SOURCE.

A source is a configuration, a run or a checkpoint. KIND is
  architecture   what the weights of SOURCE belong to, to continue from them with the configuration OTHER
  evaluation     which frames are masked, to evaluate the model OTHER on the same ones as SOURCE
  placement      where parameters, gradients and optimizer state are, to train another model of this size with OTHER
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from w2vscale.config import Config, architecture_of, in_yaml
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective, load


def architecture(config: Config) -> dict[str, Any]:
    """The settings that the weights of a model belong to, and what is added to the variance of a waveform."""
    found = {f"model.{key}": value for key, value in architecture_of(config.model).items()}
    found |= {f"objective.{key}": value for key, value in _architecture_of_objective(config).items()}
    return found | {"model.waveform_eps": config.model.waveform_eps}


def evaluation(config: Config) -> dict[str, Any]:
    """The settings that decide what is computed in an evaluation, apart from the architecture."""
    tree = config.model_dump(mode="json")
    found = {f"data.{key}": tree["data"][key] for key in ("max_seconds", "min_seconds")}
    found |= {f"batch.{key}": value for key, value in tree["batch"].items()}
    fixed = _architecture_of_objective(config)
    found |= {f"objective.{key}": value for key, value in tree["objective"].items() if key not in fixed}
    return found | {"precision.compute": config.precision.compute}


def placement(config: Config) -> dict[str, Any]:
    """The settings of the engine that decide what each GPU and host holds, apart from activations."""
    keys = ("name", "deepspeed_config", "offload", "shard_size", "reshard_after_forward")
    return {f"engine.{key}": getattr(config.engine, key) for key in keys}


KINDS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "architecture": architecture,
    "evaluation": evaluation,
    "placement": placement,
}


def different(kind: str, other: str, source: str) -> Iterator[str]:
    """The settings of `source` that `other` has with another value, as overrides of `other`."""
    theirs, ours = (KINDS[kind](load(one, new=False)[0]) for one in (other, source))
    for key, value in ours.items():
        if key in theirs and theirs[key] != value and key != "objective.name":
            yield f"{key}={in_yaml(value)}"


def _architecture_of_objective(config: Config) -> dict[str, Any]:
    return architecture_of(build_objective(config).settings)


def main() -> None:
    try:
        for line in different(*sys.argv[1:]):
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
