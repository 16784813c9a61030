"""What a run of twelve updates logs, without training it, and what each library reads from its files."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.audio import noise
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import FORKS
from w2vscale.checkpoint.format import TrainState
from w2vscale.loggers.base import Audio, Histogram
from w2vscale.loggers.drawing import Picture, png, spectrogram
from w2vscale.loggers.fan_out import Loggers, make_loggers
from w2vscale.objectives import load

UPDATES, VALIDATE_EVERY, SECONDS = 12, 4, 30.0
TRAIN = ("loss", "contrastive_bits", "accuracy", "code_perplexity_0", "lr", "grad_norm", "audio_seconds_per_second")

Found = Counter[tuple[str, str, int]]
"""How often a library finds (kind, tag, step)."""


def state(update: int, *, skipped_windows: int = 0) -> TrainState:
    return TrainState(update=update, audio_seconds=SECONDS * update, skipped_windows=skipped_windows)


def opened(exp: Path, *overrides: str, log: Any = print, at: TrainState | None = None) -> Loggers:
    """The loggers of a run that begins or continues."""
    config, objective = load("base", [*MICRO_RUN, *overrides])
    loggers = make_loggers(config, objective, exp, log, enabled=True)
    loggers.begin(at or state(0), config)
    return loggers


def log_updates(loggers: Loggers, updates: range) -> None:
    """Log these updates as the training loop does; the values depend on the update alone."""
    for update in updates:
        hours = {"hours_seen": SECONDS * update / 3600}
        loggers.write("train", update, dict.fromkeys(TRAIN, 1.0 / update) | hours)
        if update == 5:
            loggers.text("run/health", update, "the loss spikes: <b>it is 7</b>\nthe gradient norm explodes")
        if update % VALIDATE_EVERY == 0:
            loggers.histogram("weights/head", update, Histogram((0.0, 0.5, 1.0), (3.0, 4.0), 4.0, 3.0))
            loggers.write("validation", update, {"loss": 2.0 / update, "accuracy": float("nan")} | hours)
            loggers.show(picture(), update)
        loggers.commit(update)


def picture() -> Picture:
    from w2vscale.analysis.figures import new_figure

    figure = new_figure(width=1, height=1)
    figure.subplots().imshow(spectrogram(noise(0.1), 16_000))
    return Picture(
        {"1_spectrogram": png(figure), "codes_usage": png(figure)},
        {"1_audio": Audio(noise(0.1), 16_000)},
        {"1_text": "reference:  one\nhypothesis: two"},
    )


def logged(
    exp: str, overrides: tuple[str, ...], first: int, last: int, environment: dict[str, str], *, killed: bool = False
) -> None:
    """Log the updates after `first` up to `last`, in this process; the run ends there, or the process is killed."""
    os.environ |= {"WANDB_MODE": "offline"} | environment
    loggers = opened(Path(exp), *overrides, at=state(first))
    log_updates(loggers, range(first + 1, last + 1))
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    loggers.finish()
    loggers.close()


def in_a_process(
    exp: Path, overrides: tuple[str, ...], first: int, last: int, *, killed: bool = False, **environment: str
) -> None:
    """Like `logged`, in a process of its own, with these environment variables."""
    arguments = (str(exp), overrides, first, last, environment)
    process = FORKS.Process(target=logged, args=arguments, kwargs={"killed": killed})
    process.start()
    process.join(120)
    assert process.exitcode == (-signal.SIGKILL if killed else 0)


def in_tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(SIZES, 0))
    events.Reload()
    readers = {
        "scalars": events.Scalars, "images": events.Images, "audio": events.Audio, "histograms": events.Histograms,
        "tensors": events.Tensors,
    }  # fmt: skip
    tags: Any = events.Tags()
    return Counter(
        (kind, tag, event.step) for kind, read in readers.items() for tag in tags[kind] for event in read(tag)
    )


SIZES = ("scalars", "images", "audio", "histograms", "compressedHistograms", "tensors")
MEDIA = {"html-file": "tensors", "image-file": "images", "audio-file": "audio", "histogram": "histograms"}


def in_wandb(exp: Path) -> dict[str, Found]:
    """What the offline files hold, by run. Files that a row names must exist."""
    import json

    from w2vscale.loggers.wandb_file import records

    found: dict[str, Found] = {}
    for path in sorted((exp / "wandb").glob("offline-run-*/run-*.wandb")):
        rows = found.setdefault(path.stem.removeprefix("run-"), Counter())
        for record in records(path):
            row: dict[str, Any] = {}
            for item in record.history.item:
                value = json.loads(item.value_json)
                if item.nested_key[1:]:
                    row.setdefault(item.nested_key[0], {})[item.nested_key[1]] = value
                else:
                    row[item.key or item.nested_key[0]] = value
            for tag, value in row.items():
                kind = MEDIA[value["_type"]] if isinstance(value, dict) else "scalars"
                if isinstance(value, dict) and "path" in value:
                    assert (path.parent / "files" / value["path"]).stat().st_size
                if not tag.startswith("_"):
                    rows[kind, tag, record.history.step.num] += 1
    return found


def in_mlflow(folder: Path) -> dict[str, tuple[Found, dict[str, str]]]:
    """Metrics and artifacts (kind by suffix, name, update), and parameters, by the tag of the run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    found = {}
    for run in client.search_runs([one.experiment_id for one in client.search_experiments()]):
        rows: Found = Counter()
        for tag in run.data.metrics:
            rows.update(("scalars", tag, metric.step) for metric in client.get_metric_history(run.info.run_id, tag))
        folders = [""]
        while folders:
            for file in client.list_artifacts(run.info.run_id, folders.pop()):
                if file.is_dir:
                    folders.append(file.path)
                    continue
                group, update, name = Path(file.path).parts
                kind = {".png": "images", ".flac": "audio", ".txt": "tensors"}[Path(name).suffix]
                rows[kind, f"{group}/{Path(name).stem}", int(update.removeprefix("update_"))] += 1
        found[run.data.tags["w2vscale.run"]] = rows, run.data.params | {"status": run.info.status}
    return found


def expected(updates: int = UPDATES, *, histograms: bool = True) -> Found:
    """All that `log_updates` logs, once."""
    found: Found = Counter()
    groups = {
        "loss": "loss", "contrastive_bits": "loss", "accuracy": "accuracy", "code_perplexity_0": "codes",
        "lr": "optim", "grad_norm": "optim", "audio_seconds_per_second": "speed", "hours_seen": "data",
    }  # fmt: skip
    for update in range(1, updates + 1):
        found.update(("scalars", f"{group}/{key}/train", update) for key, group in groups.items())
    for update in range(VALIDATE_EVERY, updates + 1, VALIDATE_EVERY):
        validation = ("loss", "accuracy", "hours_seen")
        found.update(("scalars", f"{groups[key]}/{key}/validation", update) for key in validation)
        found.update(("images", f"samples/{name}", update) for name in ("1_spectrogram", "codes_usage"))
        found["audio", "samples/1_audio", update] += 1
        found["tensors", "samples/1_text", update] += 1
        if histograms:
            found["histograms", "weights/head", update] += 1
    found["tensors", "run/settings", 0] += 1
    if updates >= 5:
        found["tensors", "run/health", 5] += 1
    assert np.all(np.array(list(found.values())) == 1)
    return found
