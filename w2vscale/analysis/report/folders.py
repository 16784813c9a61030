"""Which of the given paths are the folders of runs, and where their report belongs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from w2vscale.errors import UserError
from w2vscale.files import nearest_path

REPORT = "report.html"
MOST_NAMED = 4  # runs in an error message


def run_folders(given: Sequence[Path], log: Callable[[str], None]) -> list[Path]:
    """Return the folders of runs. Files among them, e.g. Hydra's multirun.yaml, and runs without metrics are skipped.

    `log` gets a line for each of those.

    Raises UserError if a folder is not that of a run, or nothing given is.
    """
    for exp in given:
        if not exp.exists():
            raise UserError(f"{exp}: no such run{nearest_path(exp)}")
    runs = [exp for exp in given if exp.is_dir()]
    files = [exp for exp in given if not exp.is_dir()]
    for exp in runs:
        if not _is_run(exp):
            raise UserError(f"{exp}: not the folder of a run{_what_it_is(exp)}")
    if not runs:
        raise UserError(f"{files[0]}: not the folder of a run: it is not a folder")
    for file in files:
        log(f"skipping {file}: not a folder")
    started = [exp for exp in runs if (exp / "metrics.jsonl").is_file()]
    if not started:
        raise UserError(f"{runs[0]}: no metrics yet; the run writes them every logging.every updates")
    for exp in runs:
        if exp not in started:
            log(f"skipping {exp}: no metrics yet")
    return started


def report_path(exps: Sequence[Path]) -> Path:
    """The file for a report: in the folder of a single run; of several, in the nearest folder that holds them all."""
    if len(exps) == 1:
        return exps[0] / REPORT
    parent = Path(os.path.commonpath([exp.absolute().parent.resolve() for exp in exps]))
    here = Path.cwd()
    return (parent.relative_to(here) if parent.is_relative_to(here) else parent) / REPORT


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml"))


def _what_it_is(folder: Path) -> str:
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
    except OSError as error:
        return f": cannot be read: {error.strerror}"
    if not inside:
        return ": it has no config.yaml"
    names = ", ".join(str(path) for path in inside[:MOST_NAMED]) + (", …" if len(inside) > MOST_NAMED else "")
    runs = "the run" if len(inside) == 1 else "the runs"
    return f"; it holds {runs} {names}: name {'it' if len(inside) == 1 else f'them with {folder}/*/'}"
