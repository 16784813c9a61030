"""MLflow: a tracking server, or a database in a folder. (MLflow 3 no longer stores runs in plain files.)"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from w2vscale.errors import UserError
from w2vscale.loggers.base import RunFacts
from w2vscale.loggers.identity import Identity
from w2vscale.loggers.remote import Service
from w2vscale.loggers.rows import Row

EXPERIMENT = "w2vscale"  # unless MLFLOW_EXPERIMENT_NAME names another one
RUN_TAG, GROUP_TAG = "w2vscale.run", "w2vscale.group"
LONGEST_PARAMETER = 500  # characters; the limit of older servers
PARAMETERS_AT_ONCE = 100
SCHEMES = ("http", "https", "databricks", "sqlite", "postgresql", "mysql", "mssql")

T = TypeVar("T")


@contextmanager
def _without_announcements() -> Iterator[None]:
    """Silence the loggers that announce each step of making or opening a database."""
    loggers = [logging.getLogger(name) for name in ("mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class MlflowService(Service):
    """A run of MLflow, found by a tag. Metrics of an update arrive in one piece, after its files.

    Pictures, audio and texts are artifacts `samples/update_N/NAME`. Raises UserError if MLflow is not installed, or
    cannot have such a place.
    """

    def __init__(self, place: str, facts: RunFacts) -> None:
        self.setting = f"logging.mlflow={place}"
        self._facts = facts
        self._uri, self._artifacts = tracking_uri(place)
        self._client: Any = None
        self._run_id = ""
        self._steps: dict[str, set[int]] = {}
        _import()

    @_without_announcements()
    def open(self, who: Identity) -> None:
        from mlflow import MlflowClient

        if self._artifacts is not None:
            self._artifacts.mkdir(parents=True, exist_ok=True)
        if (database := sqlite_file(self._uri)) is not None and not database.exists():
            create_database(database)
        self._client = self._client or MlflowClient(tracking_uri=self._uri)
        experiment = self._experiment()
        found = self._client.search_runs([experiment], filter_string=f"tags.`{RUN_TAG}` = '{who.id}'", max_results=1)
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            self._log_parameters(without=found[0].data.params)  # a kill may have come between
        else:
            tags = {RUN_TAG: who.id, GROUP_TAG: who.group}
            self._run_id = self._client.create_run(experiment, run_name=who.title, tags=tags).info.run_id
            self._log_parameters(without=())
        self._steps = {}

    def has(self, row: Row) -> bool:
        """Whether all metrics of a row are there. Files of a row without metrics are written again."""
        return bool(row.scalars) and all(row.update in self._steps_of(split) for split in row.scalars)

    def send(self, row: Row) -> None:
        from mlflow.entities import Metric

        self._send_files(row)
        now = int(time.time() * 1000)
        metrics = [
            Metric(self._facts.tags.of(split, key), float(value), now, row.update)
            for split, values in row.scalars.items()
            if row.update not in self._steps_of(split)
            for key, value in values.items()
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, *, complete: bool) -> None:
        if self._run_id:
            if complete:
                self._client.set_terminated(self._run_id, "FINISHED")
            else:
                self._client.update_run(self._run_id, status="KILLED")

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        where = None if self._artifacts is None else self._artifacts.as_uri()
        return str(self._client.create_experiment(name, artifact_location=where))

    def _log_parameters(self, *, without: Container[str]) -> None:
        from mlflow.entities import Param

        parameters = [
            Param(f"{section}.{key}", json.dumps(value)[:LONGEST_PARAMETER])
            for section, values in self._facts.settings.items()
            for key, value in values.items()
            if f"{section}.{key}" not in without
        ]
        for some in _batches(parameters, PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run_id, params=some)

    def _steps_of(self, split: str) -> set[int]:
        """Updates that the run had of a split when it was opened. Every line of metrics has a loss."""
        if split not in self._steps:
            history = self._client.get_metric_history(self._run_id, self._facts.tags.of(split, "loss"))
            self._steps[split] = {metric.step for metric in history}
        return self._steps[split]

    def _send_files(self, row: Row) -> None:
        if not (row.texts or row.images or row.audio):
            return
        import soundfile

        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            for name, text in row.texts.items():
                _file(folder, name, row.update, ".txt").write_text(text, encoding="utf-8")
            for name, png in row.images.items():
                _file(folder, name, row.update, ".png").write_bytes(png)
            for name, audio in row.audio.items():
                soundfile.write(_file(folder, name, row.update, ".flac"), audio.waveform_S, audio.sampling_rate)
            self._client.log_artifacts(self._run_id, str(folder))


def tracking_uri(place: str) -> tuple[str, Path | None]:
    """Return the tracking URI of a server or folder and, for a folder, where its artifacts go.

    Raises UserError if it is a URI that MLflow does not know.
    """
    scheme, colon, _ = place.partition("://")
    if not colon and place != "databricks":
        folder = Path(place).absolute()
        return f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts"
    if scheme.partition("+")[0] not in SCHEMES:
        raise UserError(f"logging.mlflow={place}: not a folder, and not a URI of {', '.join(SCHEMES)}")
    return place, None


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite database; None for another URI."""
    scheme, _, path = uri.partition(":///")
    return Path(path) if scheme == "sqlite" and path else None


def create_database(path: Path) -> None:
    """Create an empty database of MLflow, which appears at `path` when it is complete, unless there is one by then.

    MLflow itself would need seconds in place. If it is killed meanwhile, nothing can open the database any more.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # Other runs may make one here, too. What a killed process leaves is small, and not deleted.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    store = SqlAlchemyStore(f"sqlite:///{partial.absolute()}", (path.parent / "artifacts").absolute().as_uri())
    store.engine.dispose()
    with suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()


def _import() -> None:
    try:
        import mlflow
        import sqlalchemy
    except ImportError as error:
        missing = error.name or "mlflow"
        raise UserError(f"logging.mlflow: {missing} is not installed: pip install 'w2vscale[mlflow]'") from None
    assert mlflow and sqlalchemy


def _file(folder: Path, name: str, update: int, suffix: str) -> Path:
    """The path of an artifact: GROUP/update_N/NAME."""
    group, _, last = name.partition("/")
    path = folder / group / f"update_{update:08d}" / f"{last}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _batches(values: Sequence[T], size: int) -> Iterator[list[T]]:
    remaining = iter(values)
    while batch := list(islice(remaining, size)):
        yield batch
