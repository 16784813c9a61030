"""Print the number of updates in which a run sees some hours of speech, cropped and batched by its settings."""

from __future__ import annotations

import argparse
import math
import sys

from w2vscale.errors import UserError
from w2vscale.objectives import load
from w2vscale.planning.exposure import exposure
from w2vscale.training.planning import corpus_of
from w2vscale.training.run import open_training_set


def main() -> None:
    """Read the command line: hours, and the arguments of `w2vscale train`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hours")
    parser.add_argument("config", metavar="CONF")
    parser.add_argument("settings", nargs="*", metavar="SETTING")
    arguments = parser.parse_args()
    try:
        hours = float(arguments.hours)
    except ValueError:
        hours = 0.0
    if not 0.0 < hours < math.inf:
        sys.exit(f"error: --hours {arguments.hours}: give a number of hours above 0")
    try:
        config, objective = load(arguments.config, arguments.settings)
        seen = exposure(config, corpus_of(open_training_set(config, objective)))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(max(round(hours / seen.hours_per_update), 1))


if __name__ == "__main__":
    main()
