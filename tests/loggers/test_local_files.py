"""metrics.jsonl, notes.jsonl, samples and names of metrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.helpers.audio import noise
from tests.helpers.logged import UPDATES, log_updates, opened, picture, state
from w2vscale.errors import UserError
from w2vscale.loggers.fan_out import Loggers
from w2vscale.loggers.rows import read_rows
from w2vscale.loggers.tags import Tags
from w2vscale.objectives import load


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_has_the_files_of_a_whole_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    log_updates(opened(whole), range(1, UPDATES + 1))
    log_updates(opened(resumed), range(1, 10))
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "upd')
    log_updates(opened(resumed, at=state(6)), range(7, UPDATES + 1))
    for name in ("metrics.jsonl", "logs/notes.jsonl"):
        assert lines(resumed / name) == lines(whole / name), name
    files = [sorted(path.relative_to(exp) for path in (exp / "samples").rglob("*.*")) for exp in (whole, resumed)]
    assert files[0] == files[1] and len(files[0]) == 3 * 4
    assert (whole / "samples" / "update_00000008" / "1_text.txt").read_text() == picture().texts["1_text"] + "\n"


def test_going_back_deletes_later_samples_and_a_new_start_all(tmp_path: Path) -> None:
    log_updates(opened(tmp_path), range(1, 9))
    opened(tmp_path, at=state(6))
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["update_00000004"]
    opened(tmp_path)
    assert not list((tmp_path / "samples").iterdir())
    assert [line["name"] for line in lines(tmp_path / "logs" / "notes.jsonl")] == ["run/settings"]


def test_the_newest_samples_are_kept(tmp_path: Path) -> None:
    log_updates(opened(tmp_path), range(1, 33))
    kept = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert kept == [f"update_{update:08d}" for update in (16, 20, 24, 28, 32)]
    audio, rate = soundfile.read(tmp_path / "samples" / kept[0] / "1_audio.flac")
    assert rate == 16_000 and np.allclose(audio, noise(0.1), atol=1e-4)


def test_rows_are_read_back_as_they_were_logged(tmp_path: Path) -> None:
    log_updates(opened(tmp_path), range(1, UPDATES + 1))
    rows = {row.update: row for row in read_rows(tmp_path)}
    assert sorted(rows) == list(range(UPDATES + 1))
    assert rows[8].scalars["train"]["loss"] == 1 / 8 and np.isnan(rows[8].scalars["validation"]["accuracy"])
    assert rows[5].texts["run/health"].startswith("the loss spikes")
    assert rows[8].images["samples/codes_usage"] == picture().images["codes_usage"]
    assert rows[8].texts["samples/1_text"] == picture().texts["1_text"]
    assert rows[8].audio["samples/1_audio"].sampling_rate == 16_000
    assert rows[8].histograms["weights/head"].counts == [3.0, 4.0]


def test_without_loggers_nothing_is_written(tmp_path: Path) -> None:
    loggers = Loggers(tmp_path, [])
    log_updates(loggers, range(1, 5))
    assert loggers.read("train") == [] and not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("preset", "tags"),
    [
        ("base", {"loss": "loss/loss/train", "code_perplexity_1": "codes/code_perplexity_1/train"}),
        ("ctc_1h", {"wer": "errors/wer/train", "lr": "optim/lr/train", "new_metric": "other/new_metric/train"}),
        ("best_rq_tiny", {"loss_bits": "loss/loss_bits/train", "peak_memory_gib": "speed/peak_memory_gib/train"}),
    ],
)
def test_metrics_are_grouped(preset: str, tags: dict[str, str]) -> None:
    names = Tags(load(preset, ["objective.vocabulary=letters"] if "ctc" in preset else [])[1].panels())
    assert {key: names.of("train", key) for key in tags} == tags
    shown = {key for panel in names.panels for key in panel.keys} | {"loss"}
    assert all(names.by_hours("train", key) == f"by_hours/{key}/train" for key in shown)
    assert names.by_hours("train", "lr") is None
