"""Print the settings that a model to continue from has and a configuration has not: architecture.py CONF CHECKPOINT.

One SECTION.KEY=VALUE per line: the architecture, and what is added to the variance of a waveform.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from w2vscale.config import Config, architecture_of, in_yaml
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective, load


def settings(config: Config) -> dict[str, Any]:
    """The settings that the weights of a model belong to."""
    found = {f"model.{key}": value for key, value in architecture_of(config.model).items()}
    found |= {f"objective.{key}": value for key, value in architecture_of(build_objective(config).settings).items()}
    return found | {"model.waveform_eps": config.model.waveform_eps}


def different(conf: str, checkpoint: str) -> Iterator[str]:
    """The settings of `checkpoint` that are other than in `conf`, as overrides."""
    ours, theirs = (settings(load(source, new=False)[0]) for source in (conf, checkpoint))
    for key, value in theirs.items():
        if key in ours and ours[key] != value and key != "objective.name":
            yield f"{key}={in_yaml(value)}"


def main() -> None:
    try:
        for line in different(*sys.argv[1:]):
            print(line)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
