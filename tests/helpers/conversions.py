"""All conversions as functions of the same arguments, in this process or in one of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.helpers.memory import peak_of
from tests.helpers.processes import FORKS
from w2vscale.checkpoint.averaging import average
from w2vscale.checkpoint.consolidation import consolidate
from w2vscale.checkpoint.format import committed
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.interop.importing import import_checkpoint

Progress = Callable[[int, int], None]


def ignore(done: int, total: int) -> None:
    """No progress."""


def _export(form: str, run: Path, output: Path, progress: Progress) -> object:
    return export_checkpoint(run, output, form=form, progress=progress)


def _import(name: str, run: Path, output: Path, progress: Progress) -> object:
    return import_checkpoint(run / name, output, progress=progress)


def _average(run: Path, output: Path, progress: Progress) -> object:
    return average(run, output, last=len(committed(run / "checkpoints")), progress=progress)


CONVERSIONS: dict[str, Callable[[Path, Path, Progress], object]] = {
    "import huggingface": partial(_import, "huggingface"),
    "import fairseq": partial(_import, "fairseq.pt"),
    "import fairseq2": partial(_import, "fairseq2/model.pt"),
    "export huggingface": partial(_export, "huggingface"),
    "export fairseq2": partial(_export, "fairseq2"),
    "export torchaudio": partial(_export, "torchaudio"),
    "consolidate": lambda run, output, progress: consolidate(run, output, progress=progress),
    "average": _average,
}
"""By name: functions of the folder of a run, which also has files of other libraries, and the folder to write."""


def peak_of_conversion(name: str, run: Path, output: Path) -> int:
    """The memory that a conversion takes, in a process of its own, whose allocator has no freed memory to use again."""
    with FORKS.Pool(1) as pool:
        return pool.apply_async(_peak, (name, run, output)).get(timeout=300)


def _peak(name: str, run: Path, output: Path) -> int:
    return peak_of(lambda: CONVERSIONS[name](run, output, ignore))
