"""A run in trouble stops, or goes back to a checkpoint and continues with other data. In this process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers.audio import SmallCorpus
from tests.helpers.checkpoints import seal
from tests.helpers.micro import MICRO_RUN
from tests.helpers.pages import Page
from tests.helpers.processes import Started
from tests.helpers.tasks import bad_windows
from w2vscale.analysis.report.page import write_report
from w2vscale.analysis.report.reading import read_run
from w2vscale.checkpoint.format import committed, read_document
from w2vscale.config import load_config
from w2vscale.corpora.shar import write_shards
from w2vscale.errors import UserError
from w2vscale.files import read_records
from w2vscale.training import loop
from w2vscale.training.loop import Trainer
from w2vscale.training.train import train

BAD = (8, 9)
"""Windows that give a high loss. The trouble begins after update 8 and has lasted for two lines at update 10."""

ROLL_BACK = (
    "health.action=roll_back", "health.patience=2", "checkpoint.every=4", "checkpoint.keep_last=9",
    "trainer.updates=14", "model.layers=1", "batch.micro_batches=1", "batch.max_seconds=4",
)  # fmt: skip
Run = Callable[..., Path]


@pytest.fixture
def run(small_corpus: SmallCorpus) -> Run:
    return lambda exp, *settings, bad=BAD: _run(small_corpus, exp, *settings, bad=bad)


def _run(corpus: SmallCorpus, exp: Path, *settings: str, bad: Any) -> Path:
    config = load_config("base", [*MICRO_RUN, f"data.train={corpus.train}", *ROLL_BACK, *settings])
    with bad_windows(bad, micro_batches=config.batch.micro_batches):
        assert train(config, exp) == 0
    return exp


@pytest.fixture(scope="module")
def rolled_back(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went back from update 10 to update 8 and skipped two windows."""
    return _run(small_corpus, tmp_path_factory.mktemp("rolled") / "back", "logging.tensorboard=true", bad=BAD)


def copy(exp: Path, target: Path, *, up_to: int) -> Path:
    """A run folder without the checkpoints after an update."""
    shutil.copytree(exp, target, symlinks=True)
    for path in committed(target / "checkpoints"):
        if int(path.name[-8:]) > up_to:
            shutil.rmtree(path)
    return target


def records(exp: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on time."""
    measured = ("per_second", "data_wait_fraction", "peak_memory_gib")
    lines = read_records(exp / "metrics.jsonl")
    return [{key: line[key] for key in line if not key.endswith(measured)} for line in lines]


def states(exp: Path) -> dict[str, Any]:
    """State and tensors of each checkpoint."""
    found: dict[str, Any] = {}
    for path in committed(exp / "checkpoints"):
        found[path.name] = read_document(path).state
        for file in path.glob("*.safetensors"):
            found |= {f"{path.name} {name}": tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    return found


def assert_same(exp: Path, other: Path) -> None:
    assert records(exp) == records(other)
    assert states(exp) == states(other)


def interrupted(run: Run, exp: Path, *settings: str) -> Path:
    """A run that ends, as if it were killed, when it is about to go back."""

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_roll_back", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(exp, "checkpoint.asynchronous=false", *settings)
    return exp


class TestRollBack:
    def test_it_continues_from_the_checkpoint_with_later_windows(self, rolled_back: Path) -> None:
        lines = records(rolled_back)
        assert [line["update"] for line in lines if line["split"] == "train"] == [*range(1, 15)]
        assert max(line["loss"] for line in lines if line["split"] == "train") < 6.0, "no bad window is left"
        (roll_back,) = (line for line in lines if line["split"] == "roll_back")
        assert roll_back == {"split": "roll_back", "update": 8, "left_at": 10, "skipped_windows": 2}
        assert [line["skipped_windows"] for line in lines if line["split"] == "train"] == [0] * 8 + [2] * 6
        skipped = [read_document(path).state.skipped_windows for path in committed(rolled_back / "checkpoints")]
        assert skipped == [0, 2, 2, 2]
        assert (rolled_back / "checkpoints" / "latest").resolve().name == "update_00000014"

    def test_the_metrics_say_so_before_the_checkpoint_is_saved(self, tmp_path: Path, run: Run) -> None:
        """So that both are uploaded together."""
        saved: list[list[str]] = []
        save = Trainer._save

        def recorded(trainer: Trainer) -> None:
            saved.append([line["split"] for line in read_records(trainer.run.exp / "metrics.jsonl")])
            save(trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_save", recorded)
            run(tmp_path / "exp", "trainer.updates=12")
        assert "roll_back" not in saved[1] and "roll_back" in saved[2]

    def test_from_there_it_is_a_run_that_was_given_these_windows(
        self, rolled_back: Path, tmp_path: Path, run: Run
    ) -> None:
        """The same run, interrupted at update 10. Its checkpoint then says that two windows were skipped."""
        other = interrupted(run, tmp_path / "other")
        seal(other / "checkpoints" / "update_00000008", skipped_windows=2)
        run(other, bad=())
        ours, theirs = ([line for line in records(exp) if line["split"] == "train"] for exp in (other, rolled_back))
        assert ours == theirs
        assert states(other) == states(rolled_back)

    def test_a_run_that_is_killed_after_it_resumes_bit_for_bit(
        self, rolled_back: Path, tmp_path: Path, run: Run
    ) -> None:
        for killed_after in (8, 12):
            exp = copy(rolled_back, tmp_path / str(killed_after), up_to=killed_after)
            assert_same(run(exp), rolled_back)

    def test_a_run_that_is_killed_before_it_meets_the_trouble_again(
        self, rolled_back: Path, tmp_path: Path, run: Run
    ) -> None:
        exp = interrupted(run, tmp_path / "exp")
        assert records(exp)[-1]["update"] == 10
        assert_same(run(exp), rolled_back)

    def test_checkpoints_of_the_trouble_are_set_aside(self, tmp_path: Path, run: Run) -> None:
        """Killed with one of them: the trouble goes on, and is as old as it was."""
        exp = interrupted(run, tmp_path / "killed", "checkpoint.every=1")
        assert committed(exp / "checkpoints")[-1].name == "update_00000009"
        whole, killed = run(tmp_path / "whole", "checkpoint.every=1"), run(exp, "checkpoint.every=1")
        assert_same(killed, whole)
        for exp in (whole, killed):
            (aside,) = (exp / "checkpoints").glob("abandoned_*")
            assert aside.name == "abandoned_update_00000009"
            assert read_document(aside).state.skipped_windows == 0

    def test_tensorboard_and_the_report_show_what_is_left(self, rolled_back: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(rolled_back / "tb"))
        events.Reload()
        curve = [(event.step, event.value) for event in events.Scalars("loss/loss/train")]
        train = read_run(rolled_back).train
        assert curve == [(line["update"], pytest.approx(line["loss"], rel=1e-6)) for line in train]
        assert read_run(rolled_back).roll_backs == [8]
        (event,) = events.Tensors("run/roll_back/text_summary")
        assert event.step == 8 and b"went back from update 10" in event.tensor_proto.string_val[0]

    def test_a_report_names_it_once(self, rolled_back: Path, tmp_path: Path) -> None:
        write_report([rolled_back], tmp_path / "report.html")
        page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
        rows = page.rows("health events")[1:]
        assert [row[1] for row in rows if row[2] == "went back"] == ["8"]
        assert any(row[2].startswith("health: ") for row in rows)
        assert dict(row for row in page.rows("Data"))["training set"].endswith(" h in 24 utterances")

    def test_the_log_says_what_happens(
        self,
        tmp_path: Path,
        run: Run,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        started: Started,
    ) -> None:
        loaders: list[int] = []
        windows = loop.Run.windows

        def count_loaders(run: loop.Run) -> Any:
            loaders.append(len(started()))
            return windows(run)

        monkeypatch.setattr(loop.Run, "windows", count_loaders)
        run(tmp_path / "exp", "data.workers=1", bad=(8, 9, 10, 11))
        assert loaders == [1, 0, 0], "loaders of skipped windows have ended"
        assert started() == []
        printed = " ".join(capsys.readouterr().out.split())
        assert printed.count("warning: the loss spikes") == 2, "once for each time"
        assert "going back from update 10 to the checkpoint of update 8, and skipping the data since then: " in printed
        assert read_document(committed(tmp_path / "exp" / "checkpoints")[-1]).state.skipped_windows == 4

    def test_data_that_stays_bad_ends_the_run(self, tmp_path: Path, run: Run) -> None:
        checkpoint = tmp_path / "exp" / "checkpoints" / "update_00000008"
        with pytest.raises(
            UserError, match=r"^stopped at update 10: trouble since update 8: the loss spikes: "
        ) as caught:
            run(tmp_path / "exp", bad=range(8, 99))
        assert str(caught.value).endswith(f"the run has gone back to {checkpoint} 3 times, and other data did not help")
        assert read_document(checkpoint).state.skipped_windows == 6

    def test_without_a_checkpoint_from_before_the_run_ends(self, tmp_path: Path, run: Run) -> None:
        with pytest.raises(UserError, match=r"^stopped at update 10: .*; no checkpoint is from before it$"):
            run(tmp_path / "exp", "checkpoint.every=100")
        assert not committed(tmp_path / "exp" / "checkpoints")

    def test_a_stream_goes_on_at_the_shifted_window(
        self, small_corpus: SmallCorpus, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_shards(small_corpus.train, tmp_path / "shards", shard_size=8)
        starts = []
        windows = loop.Run.windows
        monkeypatch.setattr(loop.Run, "windows", lambda self: starts.append(self.state.window) or windows(self))
        run(tmp_path / "exp", "data.mode=stream", f"data.train={tmp_path / 'shards'}")
        assert starts == [0, 10]
        assert [line["update"] for line in read_run(tmp_path / "exp").train] == [*range(1, 15)]


class TestStop:
    LEARNING_RATE = ("optim.lr=3", "optim.max_norm=null", "checkpoint.every=1")
    """So high that the codebooks collapse within five updates."""

    def test_it_names_the_trouble_and_the_newest_checkpoint_from_before(self, tmp_path: Path, run: Run) -> None:
        with pytest.raises(UserError) as caught:
            run(tmp_path / "exp", "health.action=stop", *self.LEARNING_RATE, bad=())
        message = str(caught.value)
        found = re.fullmatch(
            r"stopped at update (\d+) \(health.action=stop\): trouble since update (\d+): codebooks? .* collapsed: .*; "
            r"continue with --resume (.*)",
            message,
        )
        assert found is not None, message
        stopped, since = int(found[1]), int(found[2])
        checkpoints = committed(tmp_path / "exp" / "checkpoints")
        assert checkpoints[-1].name == f"update_{stopped - 1:08d}", "nothing is saved at the update that stops"
        assert found[3] == str(tmp_path / "exp" / "checkpoints" / f"update_{since:08d}")
        assert "\n" not in message

    def test_a_roll_back_does_not_help_against_it(self, tmp_path: Path, run: Run) -> None:
        with pytest.raises(UserError, match=r"3 times, and other data did not help|no checkpoint is from before it"):
            run(tmp_path / "exp", *self.LEARNING_RATE, "trainer.updates=40", bad=())

    def test_a_warning_is_printed_once(self, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        run(tmp_path / "exp", "health.action=warn", bad=range(8, 12))
        printed = " ".join(capsys.readouterr().out.split())
        assert printed.count("warning: the loss spikes") == 1
        assert not [line for line in records(tmp_path / "exp") if line["split"] == "roll_back"]


def test_checkpoints_of_earlier_versions_have_skipped_nothing(rolled_back: Path, tmp_path: Path) -> None:
    path = tmp_path / "update_00000012"
    shutil.copytree(rolled_back / "checkpoints" / path.name, path)
    content = json.loads((path / "train_state.json").read_text())
    del content["skipped_windows"]
    del content["sha256"]
    (path / "train_state.json").write_text(json.dumps(content | {"format": 2}))
    state = read_document(path).state
    assert (state.skipped_windows, state.window) == (0, 12)
