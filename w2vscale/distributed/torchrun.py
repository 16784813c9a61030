"""torchrun with the exit codes of docs/interruptions.md: `python -m w2vscale.distributed.torchrun`.

It takes the options of torchrun, which itself exits with code 1 and a traceback whatever happened: a script could not
tell a wrong setting from a lost machine. This module exits with the code of the first rank that failed, 128 + the
number of the signal that stopped it, or 75 if the machines lost each other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from w2vscale import interrupts
from w2vscale.distributed.launch import describe_failure
from w2vscale.errors import TemporaryError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with the arguments (default: those of the process) and return the exit code."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if line := describe_failure(rank, failure.exitcode):
            print(line, file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except (RendezvousError, dist.DistError) as failed:
        reason = failed.__cause__ or failed
        text = f"the machines cannot find each other at --rdzv-endpoint: {type(failed).__name__}: {reason}"
        print(f"error: {' '.join(text.split())[:300]}; start all of them again", file=sys.stderr)
        return TemporaryError.exit_code
    return 0


if __name__ == "__main__":
    interrupts.handle()  # until torchrun does; a Ctrl-C during the imports would be a traceback
    try:
        code = main()
    except KeyboardInterrupt:
        interrupts.leave()
    sys.exit(code)
