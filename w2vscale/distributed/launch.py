"""`--nproc-per-node`: start this same command once per process on this machine."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from w2vscale.errors import UserError


def launched() -> bool:
    """Whether a launcher (torchrun, SLURM, or this module) already started this process."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m w2vscale ARGUMENTS` in `processes` processes; returns the exit code.

    A process that fails ends the others, and its exit code is returned.

    Raises:
        UserError: the number of processes cannot be.
    """
    if processes < 1:
        raise UserError(f"--nproc-per-node {processes}: must be at least 1")
    # Imported here: it takes seconds, and most commands launch nothing.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice on LayerDrop's unused parameters, per rank
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.5,
        # Those that ask a run to stop, and the one that asks for a dump.
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "w2vscale", *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
