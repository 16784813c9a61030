"""Samples, histograms and loggers of a run: they change nothing, and survive a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.logged import Found, in_mlflow, in_tensorboard, in_wandb
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import Command
from tests.training.test_resume import wait_for_update, weights
from w2vscale.config import load_config
from w2vscale.training.observing import histogram, is_due
from w2vscale.training.train import train

ALL = ("logging.samples_every=1", "logging.histograms_every=1", "logging.attention_layers=[1,2,-1]")
MEASURED = {"audio_seconds_per_second", "updates_per_second", "data_wait_fraction", "peak_memory_gib"}


def curve(exp: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def settings(corpus: SmallCorpus, *overrides: str) -> list[str]:
    data = [f"data.train={corpus.train}", f"data.validation={corpus.validation}", "trainer.validate_every=2"]
    return [*MICRO_RUN, *data, "trainer.updates=4", *overrides]


def test_samples_and_histograms_do_not_change_a_run(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    for name, overrides in (("without", ()), ("with", ALL)):
        assert train(load_config("base", settings(small_corpus, *overrides)), tmp_path / name) == 0
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    assert not (tmp_path / "without" / "samples").exists()
    names = {
        *(f"{number}_spectrogram.png" for number in (1, 2)), *(f"{number}_audio.flac" for number in (1, 2)),
        "codes_usage.png", "codes_cooccurrence.png", *(f"attention_block_{block:02d}.png" for block in (1, 2, 3)),
    }  # fmt: skip
    found = {path.name for path in (tmp_path / "with" / "samples" / "update_00000004").iterdir()}
    assert found == names
    notes = [json.loads(line) for line in (tmp_path / "with" / "logs" / "notes.jsonl").read_text().splitlines()]
    counted = {
        (note["name"], note["update"]): sum(note["histogram"]["counts"]) for note in notes if "histogram" in note
    }
    assert counted["weights/encoder.transformer.blocks.0.attention.qkv.weight", 4] == 32 * 96
    assert counted["weights/quantizer.codevectors", 4] == 2 * 16 * 8


def test_samples_that_cannot_be_written_cost_no_update(
    small_corpus: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples").write_text("not a folder")
    assert train(load_config("base", settings(small_corpus, *ALL)), tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: logging.samples_every: " in printed and "1_spectrogram.png: cannot be written" in printed


@pytest.mark.parametrize(
    ("every", "step", "total", "due"),
    [(0, 1, 10, []), (4, 2, 10, [4, 8, 10]), (5, 2, 11, [6, 10, 11]), (1, 3, 9, [3, 6, 9]), (100, 2, 9, [9])],
)
def test_what_is_due(every: int, step: int, total: int, due: list[int]) -> None:
    chances = [*range(step, total, step), total]
    assert [
        update for update in chances if is_due(update, every, after=max(update - step, 0), last=update == total)
    ] == due


def test_a_stop_between_two_chances_adds_none() -> None:
    """Stopped at update 5, which is logged only for this reason."""
    assert [update for update, after in ((4, 0), (5, 4), (8, 5)) if is_due(update, 4, after=after, last=False)] == [
        4,
        8,
    ]


def test_a_histogram_counts_every_value() -> None:
    values = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
    found = histogram(values, values.size)
    assert sum(found.counts) == 1000 and found.total == pytest.approx(float(values.sum()), rel=1e-4)
    assert (found.edges[0], found.edges[-1]) == (values.min(), values.max())
    assert sum(histogram(np.full(7, 2.0, dtype=np.float32), 7).counts) == 7
    assert sum(histogram(np.full(7, np.nan, dtype=np.float32), 7).counts) == 0


@pytest.mark.long
def test_every_logger_has_everything_once_after_a_kill(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    """The exact set of (kind, tag, update) of an uninterrupted run, read by each library."""
    found: dict[str, list[Found]] = {}
    for name in ("whole", "killed"):
        exp = tmp_path / name
        loggers = ("logging.tensorboard=true", "logging.wandb=project", f"logging.mlflow={exp / 'mlflow'}")
        arguments = settings(
            small_corpus, *ALL, *loggers, "logging.samples_every=4", "trainer.updates=8", "checkpoint.every=3"
        )
        command = ("train", "base", *arguments, "--exp", str(exp))
        offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        if name == "killed":
            for lines in (2, 7):  # before the first checkpoint; after the samples of update 4, and before the next one
                process = Command(tmp_path / "log", *command, environment=offline)
                wait_for_update(exp, lines)
                process.kill()
                process.finish(code=-signal.SIGKILL, timeout=120)
        printed = Command(tmp_path / "log", *command, environment=offline).finish(code=0, timeout=240)
        warnings = [line for line in printed.lower().splitlines() if "warning" in line]
        assert [line for line in warnings if "waiting for data" not in line] == []  # busy machines load data slowly
        found[name] = [
            in_tensorboard(exp / "tb"),
            in_tensorboard(exp / "tb" / "by_hours"),
            *in_wandb(exp).values(),
            *(rows for rows, _ in in_mlflow(exp / "mlflow").values()),
        ]
    assert len(found["whole"]) == len(found["killed"]) == 4
    for whole, killed in zip(found["whole"], found["killed"], strict=True):
        assert killed == whole
        assert set(whole.values()) == {1} and len(whole) > 50
