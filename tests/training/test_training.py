"""The folder of a run, and its errors and warnings. In this process, on a micro model."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from tests.helpers.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import Started, running
from w2vscale.analysis.report.page import write_report
from w2vscale.analysis.report.reading import read_run
from w2vscale.config import Config, load_config
from w2vscale.data.indexed import MicroBatches
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.engine import build_engine
from w2vscale.errors import UserError
from w2vscale.files import read_metrics
from w2vscale.objectives import StepContext
from w2vscale.objectives.contrastive import Contrastive
from w2vscale.runtime import StopRequest
from w2vscale.training import run
from w2vscale.training.dry_run import dry_run
from w2vscale.training.train import train


def settings(manifest: Path, *overrides: str) -> Config:
    return load_config("base", [*MICRO_RUN, f"data.train={manifest}", *overrides])


@pytest.fixture(scope="module")
def finished(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = tmp_path_factory.mktemp("runs") / "finished"
    validation = (f"data.validation={small_corpus.validation}", "trainer.validate_every=6")
    assert train(settings(small_corpus.train, *validation, "logging.tensorboard=true"), exp) == 0
    return exp


def test_the_run_folder_has_every_file_of_the_design(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.yaml", "run.sh", "checkpoints", "metrics.jsonl", "tb", "logs"}
    assert load_config(finished / "config.yaml").trainer.updates == 12


def test_loader_processes_start_before_the_model_has_memory(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked process keeps the old version of all memory that its parent changes: a second copy of the state."""
    loaders: list[int] = []

    def count_loaders(*arguments: Any) -> Any:
        loaders.append(len(multiprocessing.active_children()))
        return build_engine(*arguments)

    monkeypatch.setattr(run, "build_engine", count_loaders)
    others = len(multiprocessing.active_children())
    assert train(settings(small_corpus.train, "data.workers=2"), tmp_path) == 0
    assert loaders == [others + 2]
    assert len(multiprocessing.active_children()) == others


def test_every_metric_is_there_and_plausible(finished: Path) -> None:
    records = read_metrics(finished / "metrics.jsonl", "train")
    assert [record["update"] for record in records] == list(range(1, 13))
    last = records[-1]
    for key in (
        "loss", "loss_bits", "contrastive", "contrastive_bits", "diversity", "feature_penalty", "accuracy",
        "code_perplexity_0", "code_perplexity_1", "probability_perplexity_0", "probability_perplexity_1",
        "masked_fraction", "temperature", "lr", "grad_norm", "audio_seconds_per_second", "padding", "hours_seen",
        "skipped_updates", "skipped_utterances",
    ):  # fmt: skip
        assert isinstance(last[key], (int, float)), key
    assert last["contrastive_bits"] == pytest.approx(last["contrastive"] / 0.693147, rel=1e-5)
    assert 0.35 < last["masked_fraction"] < 0.75
    assert 1.0 <= last["code_perplexity_0"] <= 16.0
    assert last["temperature"] == pytest.approx(2.0 * 0.999995**11)
    assert last["loss"] < records[0]["loss"]
    validation = read_metrics(finished / "metrics.jsonl", "validation")
    assert [record["update"] for record in validation] == [6, 12]
    assert validation[0]["masked_frames"] == validation[1]["masked_frames"], "the masks of validation are fixed"


def test_out_of_memory_on_a_gpu_is_reported_in_one_line(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")

    monkeypatch.setattr(Contrastive, "forward", fail)
    for concat, advice in (("auto", "set batch.concat to a number"), ("2", r"lower batch.concat \(2\)")):
        config = settings(small_corpus.train, f"batch.concat={concat}")
        message = rf"^CUDA out of memory: lower batch.max_seconds \(8\), {advice}, or recompute activations"
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / concat)
        with pytest.raises(UserError, match=message):
            dry_run(config)


def test_tensorboard_has_the_same_curve(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tb"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss/loss/train")]
    records = read_metrics(finished / "metrics.jsonl", "train")
    assert curve == [(record["update"], pytest.approx(record["loss"], rel=1e-6)) for record in records]


def test_tensorboard_has_the_metrics_of_the_report_by_audio_seen(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tb" / "by_hours"))
    events.Reload()
    keys = {"loss", *(key for panel in read_run(finished).panels for key in panel.keys)}
    assert set(events.Tags()["scalars"]) == {
        f"by_hours/{key}/{split}" for split in ("train", "validation") for key in keys
    }
    curve = [(event.step, event.value) for event in events.Scalars("by_hours/contrastive_bits/train")]
    records = read_metrics(finished / "metrics.jsonl", "train")
    assert curve == [
        (round(record["hours_seen"] * 3600), pytest.approx(record["contrastive_bits"], rel=1e-6)) for record in records
    ]


def test_resuming_with_other_data_is_reported(
    small_corpus: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for manifest, updates in ((small_corpus.train, 4), (small_corpus.train, 5), (small_corpus.validation, 6)):
        assert "data.train has changed" not in capsys.readouterr().out
        train(settings(manifest, f"trainer.updates={updates}"), tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "data.train has changed: it was 0.0 hours, 24 utterances" in printed
    assert "; it is 0.0 hours, 6 utterances" in printed


def test_a_report_has_its_curves(finished: Path, tmp_path: Path) -> None:
    runs = write_report([finished, finished], tmp_path / "out" / "report.html")
    assert [run.state for run in runs] == ["complete"] * 2
    assert [run.name for run in runs] == [finished.name, f"{finished.name} (2)"]
    assert "accuracy (contrastive accuracy) over updates" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(UserError, match="cannot be read"):
        write_report([tmp_path], tmp_path / "none.html")


def test_dry_run_runs_the_largest_micro_batch(small_corpus: SmallCorpus) -> None:
    found = dry_run(settings(small_corpus.train))
    assert found is not None
    utterances, samples = found.shapes["waveforms_BS"]
    assert samples == 32_000
    assert utterances * samples <= 8 * 16_000
    assert (found.per_series, found.per_forward) == (1, 1)
    assert sum(found.parameters.values()) > 10_000
    assert found.loss > 0.0
    assert found.grad_norm > 0.0
    assert found.peak_memory_bytes > 0


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 utterances; one is text, one is cut short and one is missing."""
    folder = tmp_path_factory.mktemp("damaged")
    cuts = [cut_of(write_audio(folder / f"u{number:02d}.flac", noise(2.0, seed=number))) for number in range(20)]
    write_text(folder / "u03.flac")
    soundfile.write(folder / "u07.flac", noise(1.0, seed=7), 16_000)
    (folder / "u11.flac").unlink()
    return write_manifest(folder / "cuts.jsonl", cuts)


def test_damaged_audio_is_skipped_counted_and_reported_once(damaged: Path, tmp_path: Path) -> None:
    assert train(settings(damaged, "data.max_bad_fraction=0.2", "trainer.updates=8"), tmp_path) == 0
    named = [json.loads(line) for line in (tmp_path / "logs" / "bad_audio.jsonl").read_text().splitlines()]
    assert sorted(entry["utterance"] for entry in named) == ["u03", "u07", "u11"]
    assert all(entry["reason"] and entry["file"].endswith(".flac") for entry in named)
    assert read_metrics(tmp_path / "metrics.jsonl", "train")[-1]["skipped_utterances"] > 3


def test_too_much_damaged_audio_stops_the_run(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="utterances are unusable") as caught:
        train(settings(damaged), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_diverging_run_stops_with_an_error(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    wild = ("optim.lr=1e30", "optim.max_norm=null", "trainer.max_skipped_in_a_row=3", "trainer.updates=100")
    with pytest.raises(UserError, match="3 updates in a row had gradients that are not finite"):
        train(settings(small_corpus.train, *wild), tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert records[-1]["skipped_updates"] >= 2


def test_an_unwritable_folder_is_an_error(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(settings(small_corpus.train), tmp_path / "file" / "exp")


def test_a_failed_start_does_not_change_an_earlier_run(finished: Path, small_corpus: SmallCorpus) -> None:
    before = (finished / "config.yaml").read_text()
    with pytest.raises(UserError, match="was made with 3"):
        train(settings(small_corpus.train, "model.layers=2"), finished)
    assert (finished / "config.yaml").read_text() == before


def test_a_run_that_is_stopped_before_its_first_update_says_that_nothing_was_to_be_saved(
    small_corpus: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        code = train(settings(small_corpus.train), tmp_path, stop=stop)
    assert code == 128 + signal.SIGTERM
    printed = capsys.readouterr().out
    assert printed.endswith("stopped by SIGTERM; the same command starts again: no update was complete\n")
    assert not [*(tmp_path / "checkpoints").iterdir()]


def test_a_stop_signal_in_the_middle_of_a_fork_loses_no_loader_process(
    small_corpus: SmallCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: Started,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fork, forked = os.fork, []

    def interrupted() -> int:
        if (process := fork()) > 0:
            forked.append(process)
            signal.raise_signal(signal.SIGTERM)
        return process

    monkeypatch.setattr(os, "fork", interrupted)
    with StopRequest() as stop:
        code = train(settings(small_corpus.train, "data.workers=2"), tmp_path, stop=stop)
    assert code == 128 + signal.SIGTERM
    assert len(forked) == 2 and not started()
    assert not any(map(running, forked))
    assert "Traceback" not in capfd.readouterr().err


def test_slow_loading_is_a_warning(
    small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = MicroBatches.windows

    def slow(*arguments: Any, **settings: Any) -> Iterator[list[MicroBatch]]:
        for window in windows(*arguments, **settings):
            time.sleep(0.5)
            yield window

    monkeypatch.setattr(MicroBatches, "windows", slow)
    train(settings(small_corpus.train, "trainer.updates=4"), tmp_path)
    assert re.search(r"warning: \d+% of the time was spent waiting for data", " ".join(capsys.readouterr().out.split()))


def test_a_manifest_with_a_wrong_sampling_rate_is_refused(tmp_path: Path) -> None:
    """The same number of samples at half the rate: decoding alone would not notice."""
    cuts = [cut_of(write_audio(tmp_path / f"u{number}.flac", noise(2.0, seed=number))) for number in range(4)]
    for number in range(4):
        soundfile.write(tmp_path / f"u{number}.flac", noise(2.0, seed=number), 8_000)
    manifest = write_manifest(tmp_path / "cuts.jsonl", cuts)
    with pytest.raises(UserError, match="sampling rate is 8000 Hz, the manifest says 16000 Hz"):
        train(settings(manifest), tmp_path / "exp")


def test_an_unreadable_validation_set_is_refused(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    cuts = [cut_of(write_audio(tmp_path / f"u{number}.flac", noise(2.0, seed=number))) for number in range(3)]
    manifest = write_manifest(tmp_path / "cuts.jsonl", cuts)
    for number in range(3):
        (tmp_path / f"u{number}.flac").unlink()
    with pytest.raises(UserError, match="none of 3 sampled utterances can be read"):
        train(settings(small_corpus.train, f"data.validation={manifest}"), tmp_path / "exp")


def test_a_skipped_update_does_not_hide_the_metrics_of_the_others(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    wild = ("optim.lr=1e30", "optim.max_norm=null", "trainer.max_skipped_in_a_row=9", "logging.every=4")
    train(settings(small_corpus.train, *wild, "trainer.updates=8"), tmp_path)
    first, second = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert first["skipped_updates"] >= 2
    assert first["loss"] > 0.0
    assert second["loss"] is None, "all four were skipped"
    assert read_run(tmp_path).latest()[0] == [[None], [None], [None, None]]


class TestSkippedUpdates:
    """An update is counted while the next one runs, and before a log line, a validation or a checkpoint."""

    @pytest.fixture
    def ran(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The number of each update that ran, in order. The loss of updates 2, 5, 6 and 7 is NaN."""
        found: list[int] = []
        forward = Contrastive.forward

        def spoil(self: Contrastive, module: Any, inputs: Any, *, step: StepContext, training: bool) -> Any:
            sums = forward(self, module, inputs, step=step, training=training)
            if not training:
                return sums
            number = step.update + 1
            found.extend([number] if number not in found else [])
            return sums._replace(total=sums.total * math.nan) if number in (2, 5, 6, 7) else sums

        monkeypatch.setattr(Contrastive, "forward", spoil)
        return found

    def test_counters_are_exact_and_a_resumed_run_continues_bit_for_bit(
        self, small_corpus: SmallCorpus, tmp_path: Path, ran: list[int]
    ) -> None:
        config = settings(
            small_corpus.train, "logging.every=4", "checkpoint.every=5", "checkpoint.keep_last=9", "trainer.updates=10",
            f"data.validation={small_corpus.validation}", "trainer.validate_every=6",
        )  # fmt: skip

        def records() -> list[dict[str, float]]:
            measured = ("per_second", "data_wait_fraction", "peak_memory_gib")
            lines = read_metrics(tmp_path / "metrics.jsonl", "train")
            return [{key: line[key] for key in line if not key.endswith(measured)} for line in lines]

        assert train(config, tmp_path) == 0
        first = records()
        assert {line["update"]: line["skipped_updates"] for line in first} == {4: 1, 5: 2, 8: 4, 10: 4}
        assert first[1]["loss"] is None, "update 5 is alone on its line"
        assert all(line["loss"] > 0 for line in first if line["update"] != 5)
        checkpoints = tmp_path / "checkpoints"
        for update, skipped in ((5, 2), (10, 4)):
            state = json.loads((checkpoints / f"update_{update:08d}" / "train_state.json").read_text())
            assert state["skipped_updates"] == skipped
        shutil.rmtree(checkpoints / "update_00000010")
        del ran[:]
        assert train(config, tmp_path) == 0
        assert ran == [6, 7, 8, 9, 10]
        assert records() == first

    @pytest.mark.parametrize("every", [1, 100])
    def test_the_run_stops_at_the_last_of_them(
        self, small_corpus: SmallCorpus, tmp_path: Path, ran: list[int], capsys: pytest.CaptureFixture[str],
        every: int,
    ) -> None:  # fmt: skip
        limit = ("trainer.max_skipped_in_a_row=3", f"logging.every={every}", "checkpoint.every=100")
        with pytest.raises(
            UserError, match=r"^3 updates in a row had .*, the last is update 7; find the module with: w2vscale replay "
        ):
            train(settings(small_corpus.train, *limit), tmp_path)
        assert ran == [*range(1, 8)]
        printed = " ".join(capsys.readouterr().out.split())
        for number in (2, 5, 6, 7):
            numbers = f"micro-batches {4 * (number - 1)} to {4 * number - 1}"
            assert f"update {number} skipped: its gradient is not finite ({numbers})" in printed


def test_an_incomplete_last_line_of_metrics_is_ignored(finished: Path, tmp_path: Path) -> None:
    text = (finished / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text + '{"split": "train", "upd')
    assert len(read_metrics(tmp_path / "metrics.jsonl", "train")) == 12
