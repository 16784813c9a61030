"""Errors of `w2vscale train` and of the commands after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.commands import error_of
from w2vscale.cli.train import run_folder
from w2vscale.data.manifest import index_path
from w2vscale.distributed import launch
from w2vscale.errors import UserError


class TestTrain:
    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.chdir(tmp_path)

    def error(self, *arguments: object) -> str:
        return error_of("train", "tiny", *arguments)

    def test_without_a_corpus_the_error_names_the_setting(self) -> None:
        assert self.error("--exp", "exp") == "data.train names no manifest: set data.train=CUTS.jsonl"

    def test_a_wrong_key_or_value_creates_no_folder(self, tmp_path: Path) -> None:
        assert "did you mean optim.lr?" in self.error("optim.lrr=3", "--exp", "exp")
        assert "optim.lr='fast'" in self.error("optim.lr=fast", "--exp", "exp")
        assert "did you mean objective.negatives?" in self.error("objective.negative=3", "--exp", "exp")
        assert not (tmp_path / "exp").exists()

    @pytest.mark.parametrize("command", ["train", "finetune"])
    def test_a_wrong_setting_of_the_objective_is_reported_before_processes_start(
        self, command: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launch, "launch", lambda arguments, processes: pytest.fail("processes were started"))
        for override, message in (
            ("objective.mask_lengths=3", "override: objective.mask_lengths: unknown setting; did you mean objective."),
            ("objective.mask_length=0", "override: objective.mask_length=0: "),
            ("mask_length=3", "override: mask_length: no section named mask_length; did you mean objective.mask_l"),
            ("objective.name=bert", "override: objective.name='bert': "),
        ):
            assert error_of(command, "ctc_1h", override, "--nproc-per-node", 2).startswith(message)
        assert "no.txt" in error_of(command, "ctc_1h", "objective.vocabulary=no.txt", "--nproc-per-node", 2)

    def test_a_fine_tuning_preset_needs_a_model_to_start_from(self, corpus: Path, tmp_path: Path) -> None:
        for command in ("train", "finetune"):
            message = error_of(command, "ctc_1h", f"data.train={corpus}", "--exp", "exp")
            assert message.startswith("the encoder is frozen but randomly initialised; set trainer.init_from")
        assert not (tmp_path / "exp").exists()

    def test_a_missing_manifest_or_index_and_a_stale_index(self, corpus: Path) -> None:
        assert self.error("data.train=no.jsonl") == "no.jsonl: no such manifest"
        assert self.error("data.train=a.wav") == "a.wav: no such manifest"
        Path("a.wav").touch()
        assert self.error("data.train=a.wav").startswith("a.wav: audio, not a manifest; make one with: w2vscale data")
        index = index_path(corpus).read_bytes()
        index_path(corpus).unlink()
        assert "w2vscale data index" in self.error(f"data.train={corpus}")
        index_path(corpus).write_bytes(index)
        with corpus.open("a") as lines:
            lines.write(corpus.read_text().splitlines()[0] + "\n")
        assert self.error(f"data.train={corpus}").startswith(f"{corpus}: changed since it was indexed")

    def test_an_empty_corpus(self, corpus: Path, tmp_path: Path) -> None:
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        assert self.error(f"data.train={empty}") == f"{empty}: the manifest is empty"
        message = self.error(f"data.train={corpus}", "data.max_seconds=30", "data.min_seconds=20")
        assert message.startswith(f"{corpus}: no utterance is long enough")

    def test_a_missing_validation_manifest(self, corpus: Path) -> None:
        assert self.error(f"data.train={corpus}", "data.validation=no.jsonl") == "no.jsonl: no such manifest"

    def test_audio_that_is_text(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "a.flac", noise(3.0))
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path)])
        write_text(path)
        assert f"the first: a ({path}): not readable as audio" in self.error(f"data.train={manifest}")

    def test_an_experiment_folder_that_cannot_be_written(self, corpus: Path, tmp_path: Path) -> None:
        blocked = write_text(tmp_path / "file")
        content = blocked.read_bytes()
        for exp, problem in (
            (blocked, "a file, not a folder; choose another one"),
            (blocked / "deeper", "cannot be written"),
        ):
            assert self.error(f"data.train={corpus}", "--exp", exp).startswith(f"{exp}: {problem}")
        assert blocked.read_bytes() == content

    def test_a_checkpoint_that_does_not_exist(self, corpus: Path) -> None:
        assert "no/checkpoint" in self.error(f"data.train={corpus}", "--resume", "no/checkpoint")

    def test_crops_too_short_for_the_objective(self, corpus: Path) -> None:
        message = self.error(f"data.train={corpus}", "data.max_seconds=0.06", "data.min_seconds=0.05")
        assert message.startswith("data.max_seconds=0.06: shorter than 3 frames")

    def test_zero_processes(self, corpus: Path) -> None:
        assert self.error(f"data.train={corpus}", "--nproc-per-node", 0) == "--nproc-per-node 0: must be at least 1"


class TestRunFolder:
    def test_it_is_named_by_the_preset_or_file(self, tmp_path: Path) -> None:
        for source, expected in (("base", "base"), ("conf/my.v2.yaml", "my.v2"), ("conf/my.v2", "my.v2")):
            assert run_folder(source, None) == Path("exp") / expected
            assert run_folder(source, tmp_path) == tmp_path

    def test_a_run_continues_in_its_own_folder(self, tmp_path: Path) -> None:
        (tmp_path / "base.v2").mkdir()
        (tmp_path / "base.v2" / "config.yaml").write_text("preset: base\n")
        assert run_folder(str(tmp_path / "base.v2"), None) == tmp_path / "base.v2"

    def test_a_checkpoint_does_not_say_where_a_run_belongs(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("preset: base\n")
        (tmp_path / "train_state.json").write_text("{}")
        (tmp_path / "averaged" / "checkpoints").mkdir(parents=True)
        for folder in (tmp_path, tmp_path / "averaged"):
            with pytest.raises(UserError, match="not the folder of a run; choose one with --exp"):
                run_folder(str(folder), None)
            assert run_folder(str(folder), Path("x")) == Path("x")


class TestOtherCommands:
    def test_statistics_report_a_wrong_setting_of_the_objective(self, corpus: Path) -> None:
        message = error_of("data", "stats", corpus, "--set", "objective.negative=3")
        assert message == "override: objective.negative: unknown setting; did you mean objective.negatives?"

    def test_evaluate_and_report_name_a_missing_folder(self, corpus: Path, tmp_path: Path) -> None:
        assert str(tmp_path / "no") in error_of("evaluate", tmp_path / "no", "--cuts", corpus)
        assert str(tmp_path / "no") in error_of("report", tmp_path / "no")
