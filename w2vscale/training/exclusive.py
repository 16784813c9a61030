"""What only one run may use at a time: its folder and its store. Rank 0 holds them for all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from w2vscale.checkpoint.lock import Lock, locked
from w2vscale.checkpoint.mirror import Mirror
from w2vscale.checkpoint.retention import Retention
from w2vscale.config import Config
from w2vscale.distributed.process_group import Patience, Ranks, errors_on_all_ranks
from w2vscale.storage.urls import Url
from w2vscale.training.shared_folder import require_shared


@contextmanager
def locked_by_main(exp: Path, ranks: Ranks, log: Callable[[str], None]) -> Iterator[Lock | None]:
    """Have rank 0 hold the lock of the run folder, and yield it there. Collective.

    Raises UserError if the hosts of the run do not share the folder.
    """
    lock = None
    with ExitStack() as held:
        with errors_on_all_ranks():
            if ranks.is_main:
                lock = held.enter_context(locked(exp, log))
        require_shared(exp, ranks, lock)
        yield lock


@contextmanager
def mirrored_by_main(
    config: Config, exp: Path, ranks: Ranks, resume: str, log: Callable[[str], None], patience: Patience
) -> Iterator[Mirror | None]:
    """Have rank 0 own `checkpoint.store`, if it is set, and upload to it. Collective."""
    mirror, keep = None, config.checkpoint
    with ExitStack() as opened:
        if isinstance(keep.store, Url):
            if ranks.is_main:
                retention = Retention(keep.keep_last, keep.keep_every, keep.keep_best, config.trainer.best_metric)
                mirror = Mirror(keep.store, exp / "checkpoints", retention, log, patience.progress)
                opened.enter_context(closing(mirror))
            patience.run(lambda: mirror.open(resume) if mirror is not None else None)
        yield mirror
