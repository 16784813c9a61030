"""Trains the micro model with each of several engines, in the process group that the environment describes.

    python -m tests.helpers.one_after_another CORPUS FOLDER '{"NAME": ["SECTION.KEY=VALUE", …], …}'

Prints the loss of each update by name, as JSON, on rank 0.
"""

from __future__ import annotations

import json
import sys

from tests.helpers.tasks import train_micro
from w2vscale.distributed.process_group import process_group

if __name__ == "__main__":
    corpus, folder, engines = sys.argv[1:]
    with process_group(needed=True) as (ranks, _):
        losses = {name: train_micro(corpus, f"{folder}/{name}", given) for name, given in json.loads(engines).items()}
        if ranks.is_main:
            print(json.dumps(losses), flush=True)
