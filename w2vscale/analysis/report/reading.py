"""Read the folder of a run for a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from w2vscale.analysis.events import Events, read_events
from w2vscale.config import Config, load_config
from w2vscale.errors import UserError
from w2vscale.files import read_metrics, read_text
from w2vscale.objectives import resolve
from w2vscale.objectives.base import Panel

Record = dict[str, Any]
LONGEST_SCRIPT = 20_000  # characters of run.sh


@dataclass(frozen=True)
class Run:
    """A run: its settings, its metrics, the panels in which its objective plots them, and its events."""

    exp: Path
    name: str
    config: Config  # with the defaults of the objective
    panels: tuple[Panel, Panel, Panel]
    train: list[Record]
    validation: list[Record]
    further: dict[str, list[Record]]  # validations on the sets of data.validation_sets, by name
    roll_backs: list[int]  # updates to which the run went back
    events: Events = field(default_factory=Events)
    script: str = ""  # run.sh

    @property
    def update(self) -> int:
        """The update of the newest log line."""
        return int(self.train[-1]["update"])

    @property
    def complete(self) -> bool:
        """Whether it has done all updates, or early stopping has ended it."""
        return self.update >= self.config.trainer.updates or self.ended_early

    @property
    def ended_early(self) -> bool:
        """Whether early stopping has ended it, and it was not continued since."""
        return self.events.stopped is not None and self.events.stopped.early

    @property
    def state(self) -> str:
        """`complete`, `complete: stopped early at update n of N`, `stopped at update n of N`, or `update n of N`: of a
        run that goes on or was killed."""
        progress = f"update {self.update:,} of {self.config.trainer.updates:,}"
        if self.update >= self.config.trainer.updates:
            return "complete"
        if self.ended_early:
            return f"complete: stopped early at {progress}"
        return f"stopped at {progress}" if self.events.stopped else progress

    def latest(self) -> tuple[list[list[float | None]], list[list[float | None]]]:
        """The latest training and validation metrics: the values of each panel, None where they were not measured."""
        last, validation = self.train[-1], self.validation[-1] if self.validation else {}
        return (
            [[last.get(key) if panel.training else None for key in panel.keys] for panel in self.panels],
            [[validation.get(key) for key in panel.keys] for panel in self.panels],
        )

    def latest_further(self) -> dict[str, list[list[float | None]]]:
        """The latest metrics of each further validation set: the values of each panel, as in `latest`."""
        return {
            name: [[records[-1].get(key) for key in panel.keys] for panel in self.panels]
            for name, records in self.further.items()
            if records
        }


def read_run(exp: Path) -> Run:
    """Read a run folder. Raises UserError if it is not one, or has no metrics yet."""
    path = exp / "metrics.jsonl"

    def records(split: str) -> list[Record]:
        return [record for record in read_metrics(path, split) if record.get("hours_seen") is not None]

    train = records("train")
    if not train:
        raise UserError(f"{exp}: no metrics yet; the run has logged no update")
    if not (exp / "config.yaml").is_file():
        raise UserError(f"{exp}: not a run folder: it contains no config.yaml")
    config, objective = resolve(load_config(exp.absolute()))  # not a preset of that name
    return Run(
        exp=exp,
        name=exp.resolve().name,
        config=config,
        panels=objective.panels(),
        train=train,
        validation=records("validation"),
        further={name: records(f"validation_{name}") for name in config.data.validation_sets},
        roll_backs=[line["update"] for line in read_metrics(path, "roll_back")],
        events=read_events(exp),
        script=_script(exp / "run.sh"),
    )


def read_runs(exps: Sequence[Path], *, progress: Callable[[], None] = lambda: None) -> list[Run]:
    """Read run folders, and give each run another name. `progress` is called after each. UserError as `read_run`."""
    runs = []
    for exp in exps:
        runs.append(read_run(exp))
        progress()
    return [replace(run, name=name) for run, name in zip(runs, names([run.exp for run in runs]), strict=True)]


def names(exps: Sequence[Path]) -> list[str]:
    """The last parts of each path: as few as make them distinct. A folder that occurs again has a number."""
    resolved = [exp.resolve() for exp in exps]
    count = 1
    while count < max(len(path.parts) for path in resolved):
        short = {path: "/".join(path.parts[-count:]) for path in resolved}
        if len(set(short.values())) == len(short):
            break
        count += 1
    found: list[str] = []
    for number, path in enumerate(resolved):
        again = resolved[:number].count(path)
        found.append("/".join(path.parts[-count:]) + (f" ({again + 1})" if again else ""))
    return found


def _script(path: Path) -> str:
    try:
        return read_text(path)[:LONGEST_SCRIPT]
    except (OSError, UserError):
        return ""
