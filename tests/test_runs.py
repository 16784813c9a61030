"""Training from Python: what `w2vscale.train` and `w2vscale.Run` give, and that a notebook stays as it was."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # changes the environment and the filters of warnings, once for each process

import w2vscale
from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale import interrupts, runtime

FEW = ("trainer.updates=4", "schedule.warmup_updates=2", "checkpoint.every=2", "trainer.validate_every=2")


def settings(corpus: SmallCorpus, *more: str) -> tuple[str, ...]:
    return (*MICRO_RUN, f"data.train={corpus.train}", f"data.validation={corpus.validation}", *FEW, *more)


def wakeup_descriptor() -> int:
    """The file descriptor to which Python writes the numbers of signals, such as that of asyncio; -1: none."""
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return descriptor


@pytest.fixture
def event_loop() -> Iterator[None]:
    """Handle a signal with asyncio, as notebooks do."""
    loop = asyncio.new_event_loop()
    loop.add_signal_handler(signal.SIGUSR2, print)
    yield
    loop.close()


def process_state() -> dict[str, Any]:
    """What belongs to the process and a library could change."""
    return {
        # Without SIGCHLD: the DataLoader of PyTorch handles it once for each process.
        "signals": {number: signal.getsignal(number) for number in signal.Signals if number != signal.SIGCHLD},
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "wakeup": wakeup_descriptor(),
        "interrupted": interrupts.asked(),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "paths": list(sys.path),
        "warnings": list(warnings.filters),
        "handlers": (list(logging.root.handlers), logging.root.level),
        "collection": (gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()),
        "hooks": (sys.exit, sys.excepthook, threading.excepthook, sys.unraisablehook),
        "streams": (sys.stdout, sys.stderr),
        "torch": (
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.mkldnn.enabled,
        ),
    }  # fmt: skip


@pytest.mark.usefixtures("event_loop")
def test_training_from_python(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    """One run: its functions are called at the right updates, and nothing of the process changes."""
    updates: list[tuple[int, float]] = []
    validations: list[tuple[int, float]] = []
    checkpoints: list[tuple[int, bool]] = []
    assert wakeup_descriptor() >= 0
    before, threads = process_state(), set(threading.enumerate())
    run = w2vscale.train(
        "base", *settings(small_corpus, "data.workers=1"), exp=tmp_path / "run", verbosity="quiet",
        on_update=lambda update, metrics: updates.append((update, metrics["loss"])),
        on_validation=lambda update, metrics: validations.append((update, metrics["loss"])),
        on_checkpoint=lambda update, path: checkpoints.append((update, (path / "train_state.json").is_file())),
    )  # fmt: skip
    after = process_state()
    for name, state in before.items():
        assert after[name] == state, name
    left = [thread for thread in set(threading.enumerate()) - threads if not thread.daemon]
    for thread in left:
        thread.join(timeout=5.0)
    assert not any(thread.is_alive() for thread in left)

    columns = run.metrics()
    assert updates == list(zip(columns["update"], columns["loss"], strict=True))
    assert [update for update, _ in updates] == [1, 2, 3, 4]
    assert [update for update, _ in validations] == run.metrics("validation")["update"] == [2, 4]
    assert checkpoints == [(2, True), (4, True)]
    assert [path.name for path in run.checkpoints] == ["update_00000002", "update_00000004"]
    assert run.complete and run.config.trainer.updates == 4 and run.exp == tmp_path / "run"
    with pytest.raises(
        w2vscale.UserError, match=r"^validaton: no such split of .*run: choose one of train, validation$"
    ):
        run.metrics("validaton")
    assert sum(parameter.numel() for parameter in run.load().model.parameters()) == 65_120


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_tracking_services_leave_the_process_as_it_was(
    service: str, small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what their libraries keep: an environment variable of W&B, and filters of warnings of MLflow."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SERVICE", "")  # restored after the test
    monkeypatch.delenv("WANDB_SERVICE")
    before = process_state()
    given = settings(small_corpus, f"logging.{service}={'project' if service == 'wandb' else tmp_path / 'mlflow'}")
    w2vscale.train("base", *given, exp=tmp_path / "run", verbosity="quiet")
    after = process_state()
    after["environment"].pop("WANDB_SERVICE", None)
    for name in before.keys() - {"warnings"}:
        assert after[name] == before[name], name


def test_training_in_a_thread(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    """Only the main thread can handle signals."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        given = settings(small_corpus, "data.workers=1")
        run = pool.submit(w2vscale.train, "base", *given, exp=tmp_path, verbosity="quiet").result(timeout=120)
    assert run.complete


def test_columns_have_equal_lengths_and_none_for_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: tiny\n")
    (tmp_path / "metrics.jsonl").write_text(
        '{"split": "train", "update": 1, "loss": 2.5}\n{"split": "validation", "update": 1, "loss": 3.0}\n'
        '{"split": "train", "update": 2, "loss": null, "mfu": 0.3}\n'
    )
    run = w2vscale.Run(tmp_path)
    assert run.metrics() == {"update": [1, 2], "loss": [2.5, None], "mfu": [None, 0.3]}
    assert run.metrics("validation") == {"update": [1], "loss": [3.0]}
    assert run.checkpoints == []


def test_an_error_of_a_function_ends_the_run_and_the_next_call_continues(
    small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    def fail(update: int, metrics: Any) -> None:
        if update == 3:
            raise ZeroDivisionError("of the user")

    handler = signal.getsignal(signal.SIGINT)
    given = settings(small_corpus)
    with pytest.raises(ZeroDivisionError, match="of the user"):
        w2vscale.train("base", *given, exp=tmp_path, verbosity="quiet", on_update=fail)
    assert signal.getsignal(signal.SIGINT) is handler
    assert w2vscale.train("base", *given, exp=tmp_path, verbosity="quiet").metrics()["update"] == [1, 2, 3, 4]


def test_an_interrupted_cell_saves_and_the_next_call_continues(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    def interrupt(update: int, metrics: Any) -> None:
        if update == 3:
            signal.raise_signal(signal.SIGINT)

    given = settings(small_corpus, "checkpoint.every=100", "trainer.updates=6")
    run = w2vscale.train("base", *given, exp=tmp_path, verbosity="quiet", on_update=interrupt)
    stopped = [path.name for path in run.checkpoints]
    assert len(stopped) == 1 and stopped[0] < "update_00000006" and not run.complete
    assert w2vscale.train("base", *given, exp=tmp_path, verbosity="quiet").metrics()["update"] == [1, 2, 3, 4, 5, 6]
    assert run.complete


def test_a_second_interruption_ends_the_run_at_once(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(update: int, metrics: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runtime, "ONE_REQUEST_SECONDS", 0.0)
    before = process_state()
    with pytest.raises(KeyboardInterrupt):
        w2vscale.train("base", *settings(small_corpus), exp=tmp_path, verbosity="quiet", on_update=interrupt)
    after = process_state()
    for name in ("signals", "wakeup", "interrupted", "random"):
        assert after[name] == before[name], name


def test_a_run_whose_time_is_over_is_not_complete(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    run = w2vscale.train("base", *settings(small_corpus, "trainer.max_hours=1e-9"), exp=tmp_path, verbosity="quiet")
    assert not run.complete


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"verbosity": "loud"}, "^verbosity='loud': choose one of quiet, normal, verbose$"),
        ({"exp": ""}, "^exp is empty"),
        ({"on_update": 5}, "^5: not a function to call$"),
    ],
)
def test_wrong_arguments_are_refused_before_training(
    given: dict[str, Any], message: str, small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(w2vscale.UserError, match=message):
        w2vscale.train("base", *settings(small_corpus), **{"exp": "exp", **given})
    assert not [*tmp_path.iterdir()]


def test_a_function_cannot_train_in_the_same_folder(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    refused = []

    def train_again(update: int, metrics: Any) -> None:
        with pytest.raises(w2vscale.UserError, match="in use by this process") as caught:
            w2vscale.train("base", *settings(small_corpus), exp=tmp_path / "run", verbosity="quiet")
        refused.append(str(caught.value))

    run = w2vscale.train(
        "base", *settings(small_corpus), exp=tmp_path / "run", verbosity="quiet", on_validation=train_again
    )
    assert run.complete and len(refused) == 2


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(w2vscale.UserError, match=r"^.*missing: not the folder of a run: it has no config.yaml"):
        w2vscale.Run(tmp_path / "missing")
    (tmp_path / "config.yaml").write_text("preset: tiny\n")
    config = w2vscale.Run(tmp_path).config
    with pytest.raises(w2vscale.UserError, match=r"^optim.lr=1: overrides are for a preset or a file"):
        w2vscale.train(config, "optim.lr=1", exp=tmp_path)
