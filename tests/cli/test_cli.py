"""The command: what it prints, and that every mistake of a user is one line that names the thing, with exit code 2."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest, write_text
from w2vscale.cli.app import app, main
from w2vscale.cli.progress import console
from w2vscale.config import load_config, preset_names
from w2vscale.config.load import settings
from w2vscale.data.manifest import index_path
from w2vscale.errors import UserError
from w2vscale.version import __version__

HEAVY = ("torch", "deepspeed", "transformers", "torchaudio", "lhotse", "matplotlib", "tensorboard", "soundfile")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in this process; returns what it printed."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        app(args=[str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return call


def error_of(*arguments: object) -> str:
    """The message with which a command ends: one line, without a traceback's or another library's text."""
    with pytest.raises(UserError) as caught:
        app(args=[str(argument) for argument in arguments], standalone_mode=False)
    message = str(caught.value)
    assert message and "\n" not in message
    assert "torchaudio" not in message
    return message


def command(*arguments: object, script: str | None = None) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, or a script."""
    given = ["-c", script] if script is not None else ["-m", "w2vscale"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *given, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.fixture
def corpus(small_corpus: SmallCorpus, tmp_path: Path) -> Path:
    """A copy of the small corpus' manifest that a test may spoil."""
    path = Path(shutil.copy(small_corpus.train, tmp_path / "cuts.jsonl"))
    shutil.copy(index_path(small_corpus.train), index_path(path))
    return path


class TestHelp:
    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("config",),
            ("config", "show"),
            ("config", "presets"),
            ("config", "keys"),
            ("data",),
            ("data", "prepare"),
            ("data", "prepare", "librispeech"),
            ("data", "prepare", "mini_librispeech"),
            ("data", "prepare", "folder"),
            ("data", "validate"),
            ("data", "stats"),
            ("data", "index"),
            ("train",),
            ("evaluate",),
            ("report",),
            ("export",),
            ("import",),
            ("features",),
        ],
        ids=" ".join,
    )
    def test_every_command_explains_itself(self, arguments: tuple[str, ...]) -> None:
        for option in ("--help", "-h"):
            result = CliRunner().invoke(app, [*arguments, option])
            assert result.exit_code == 0
            assert "Usage:" in result.output

    def test_a_group_without_a_command_shows_its_help(self) -> None:
        for arguments in ([], ["data"], ["config"], ["data", "prepare"]):
            assert "Commands" in CliRunner().invoke(app, arguments).output

    def test_version(self, run: Callable[..., str]) -> None:
        assert run("--version") == f"{__version__}\n"

    @pytest.mark.parametrize("arguments", [["trian"], ["data", "valdate"], ["train", "tiny", "--ressume", "auto"]])
    def test_an_unknown_command_or_option_names_the_nearest_and_exits_with_2(self, arguments: list[str]) -> None:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert re.search("train|validate|--resume", result.output)

    def test_import_and_help_load_nothing_heavy(self) -> None:
        script = f"""
import sys
import w2vscale
from w2vscale.cli.app import main
heavy = [name for name in {HEAVY!r} if name in sys.modules]
for arguments in (["--help"], ["data", "prepare", "--help"], ["train", "--help"], ["--version"]):
    sys.argv = ["w2vscale", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code
heavy += [name for name in {HEAVY!r} if name in sys.modules]
print("loaded:", heavy)
"""
        done = command(script=script)
        assert done.stdout.splitlines()[-1] == "loaded: []", done.stderr


class TestTheProcess:
    def test_a_mistake_is_one_line_and_exit_code_2(self) -> None:
        done = command("config", "show", "base", "optim.lr=fast")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: override: optim.lr='fast': ")
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize("place", [0, 4], ids=["first", "last"])
    def test_debug_shows_where_it_came_from(self, place: int) -> None:
        arguments = ["config", "show", "base", "optim.lr=fast"]
        arguments.insert(place, "--debug")
        done = command(*arguments)
        assert done.returncode not in (0, 2)
        assert "Traceback" in done.stderr and "load_config" in done.stderr

    @pytest.mark.distributed
    def test_a_mistake_that_all_processes_meet_is_said_once(self, tmp_path: Path) -> None:
        settings = ["data.train=no.jsonl", "batch.micro_batches=2"]
        done = command("train", "tiny", *settings, "--exp", tmp_path / "exp", "--nproc-per-node", 2)
        assert (done.returncode, done.stderr) == (2, "error: no.jsonl: no such manifest\n")

    def test_a_manifest_that_disagrees_with_its_files_ends_validation_with_exit_code_2(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "a.wav", noise(1.0))
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path)])
        write_text(path)
        done = command("data", "validate", manifest)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {manifest}: 1 bad utterance of 1, listed in {manifest}.bad_audio; "
            f"the first one: a ({path}): not readable as audio: Format not recognised\n"
        )

    @pytest.mark.parametrize(
        "arguments",
        [
            ["train", "tiny", "data.train=cuts.jsonl", "--exp", "exp"],
            ["finetune", "ctc_1h", "trainer.init_from=exp/base"],
            ["evaluate", "exp/base", "--cuts", "cuts.jsonl"],
            ["transcribe", "exp/base", "speech.wav", "--json"],
        ],
        ids=lambda arguments: arguments[0],
    )
    def test_processes_are_launched_with_the_same_arguments(
        self, arguments: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = [*arguments, "--nproc-per-node", "2"]
        launches: list[tuple[list[str], int]] = []

        def launch(arguments: list[str], processes: int) -> int:
            launches.append((arguments, processes))
            return 7

        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setattr("w2vscale.distributed.launch.launch", launch)
        monkeypatch.setattr(sys, "argv", ["w2vscale", "--debug", *given])
        for name in ("W2VSCALE_DEBUG", "TQDM_DISABLE"):
            monkeypatch.setenv(name, "1")  # main() sets them too; this restores them
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 7
        assert launches == [(given, 2)]


class TestConfigCommands:
    def test_show_prints_what_can_be_loaded_again(self, run: Callable[..., str], tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(run("config", "show", "large", "optim.lr=1e-4", "data.train=a.jsonl"))
        assert load_config(path) == load_config("large", ["optim.lr=1e-4", "data.train=a.jsonl"])
        assert run("config", "show", path) == path.read_text()

    @pytest.mark.parametrize("name", ["presets", "keys"])
    def test_tables_lose_no_name_on_a_narrow_terminal(
        self, name: str, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console, "width", 80)
        lines = run("config", name).splitlines()
        names = preset_names() if name == "presets" else [row[0] for row in settings()]
        assert set(names) <= {line.split()[0] for line in lines if line.strip()}
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)

    def test_presets_lists_each_with_its_parameters(self, run: Callable[..., str]) -> None:
        rows = {line.split()[0]: line for line in run("config", "presets").splitlines()[1:]}
        assert list(rows) == preset_names()
        assert "95,044,608" in rows["base"]
        counts = [int(re.findall(r"[\d,]{7,}", row)[0].replace(",", "")) for row in rows.values()]
        assert all(count > 10**6 for count in counts)

    def test_keys_lists_every_setting_with_its_default(self, run: Callable[..., str]) -> None:
        rows = {line.split()[0]: line for line in run("config", "keys").splitlines()}
        for key, kind, default, _ in settings():
            assert kind in rows[key]
            assert default[:20] in rows[key]

    @pytest.mark.parametrize(
        ("arguments", "start"),
        [
            (["base", "optim.lrr=1"], "override: optim.lrr: unknown setting; did you mean optim.lr?"),
            (["base", "optim.lr=fast"], "override: optim.lr='fast': "),
            (["base", "optim.lr"], "optim.lr: an override has the form section.key=value"),
            (["bsae"], "bsae: neither a file nor a preset; did you mean base?"),
            (["missing/run.yaml"], "missing/run.yaml: neither a file nor a preset"),
        ],
    )
    def test_mistakes(self, arguments: list[str], start: str) -> None:
        assert error_of("config", "show", *arguments).startswith(start)


class TestPrepare:
    def test_folder_then_index_then_validate_then_stats(
        self, mixed_audio: Path, tmp_path: Path, run: Callable[..., str]
    ) -> None:
        cuts = tmp_path / "data" / "cuts_train.jsonl"
        printed = run("data", "prepare", "folder", mixed_audio, cuts.parent, "--jobs", 2)
        assert printed == f"{cuts}: 6 utterances, 0.01 hours\n"
        assert run("data", "index", cuts) == f"{index_path(cuts)}: 6 utterances\n"
        assert run("data", "validate", cuts) == f"{cuts}: no problem found in 6 utterances\n"
        printed = run("data", "stats", cuts, "--config", "tiny", "--set", "data.min_seconds=2.2")
        assert re.search(r"utterances +6\b", printed)
        assert re.search(r"speakers +3\b", printed)
        assert re.search(r"transcribed +2\b", printed)
        assert "44100 Hz (2)" in printed and "8000 Hz (1)" in printed
        assert "1 shorter than 2.2 s left out" in printed
        assert "█" in printed  # the histogram

    def test_validation_share_makes_two_manifests(
        self, mixed_audio: Path, tmp_path: Path, run: Callable[..., str]
    ) -> None:
        printed = run(
            "data", "prepare", "folder", mixed_audio, tmp_path, "--validation-share", 0.5, "--segment-seconds", 2
        )
        assert [line.partition(":")[0] for line in printed.splitlines()] == [
            str(tmp_path / "cuts_train.jsonl"),
            str(tmp_path / "cuts_validation.jsonl"),
        ]

    def test_mini_librispeech(self, shared_data: Path, tmp_path: Path, run: Callable[..., str]) -> None:
        printed = run("data", "prepare", "mini_librispeech", shared_data, tmp_path, "--part", "dev-clean-2")
        assert printed == f"{tmp_path / 'cuts_dev-clean-2.jsonl'}: 58 utterances, 0.20 hours\n"

    def test_a_text_file_named_flac(self, tmp_path: Path, run: Callable[..., str]) -> None:
        write_audio(tmp_path / "audio" / "good.flac", noise(1.0))
        bad = write_text(tmp_path / "audio" / "bad.flac")
        message = error_of("data", "prepare", "folder", tmp_path / "audio", tmp_path)
        assert message == (
            f"{bad}: not readable as audio: Format not recognised; leave such files out with --skip-unreadable"
        )
        printed = run("data", "prepare", "folder", tmp_path / "audio", tmp_path, "--skip-unreadable")
        assert "1 utterance, 0.00 hours, 1 unreadable file left out" in printed

    def test_an_empty_or_missing_folder(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "no audio files" in error_of("data", "prepare", "folder", tmp_path / "empty", tmp_path)
        assert "no such folder" in error_of("data", "prepare", "folder", tmp_path / "no", tmp_path)
        assert "contains no part of the corpus" in error_of(
            "data", "prepare", "librispeech", tmp_path / "empty", tmp_path
        )

    def test_an_output_that_cannot_be_written(self, mixed_audio: Path, tmp_path: Path) -> None:
        blocked = write_text(tmp_path / "file")
        message = error_of("data", "prepare", "folder", mixed_audio, blocked)
        assert message.startswith(f"{blocked / 'cuts_train.jsonl'}: cannot be written: ")


class TestManifests:
    def test_validate_prints_the_others_and_ends_with_the_first(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cuts = [cut_of(write_audio(tmp_path / f"u{n}.wav", noise(0.5, seed=n))) for n in range(40)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", cuts)
        for number in range(30):
            (tmp_path / f"u{number}.wav").unlink()
        assert error_of("data", "validate", manifest) == (
            f"{manifest}: 30 bad utterances of 40, listed in {manifest}.bad_audio; "
            f"the first one: u0 ({tmp_path / 'u0.wav'}): no such file"
        )
        printed = capsys.readouterr().out.splitlines()
        assert printed == [f"u{n} ({tmp_path / f'u{n}.wav'}): no such file" for n in range(1, 20)]

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"sampling_rate": 8_000, "num_samples": 24_000}, "sampling rate is 16000 Hz, the manifest says 8000 Hz"),
            ({"duration": 4.0, "num_samples": 64_000}, "duration is 3.000 s, the manifest says 4.000 s"),
        ],
    )
    def test_a_manifest_whose_rate_or_duration_disagrees_with_its_file(
        self, changes: dict[str, float], reason: str, tmp_path: Path
    ) -> None:
        cut = cut_of(write_audio(tmp_path / "a.flac", noise(3.0)))
        recording = dataclasses.replace(cut.recording, **changes)
        wrong = dataclasses.replace(cut, recording=recording, duration=recording.duration)
        manifest = write_manifest(tmp_path / "cuts.jsonl", [wrong])
        assert error_of("data", "validate", manifest).endswith(f"({tmp_path / 'a.flac'}): {reason}")
        # The same mistake stops training before it starts.
        message = error_of("train", "tiny", f"data.train={manifest}", "--exp", tmp_path / "exp")
        assert reason in message and "w2vscale data validate" in message

    def test_several_manifests_are_all_treated(self, small_corpus: SmallCorpus, run: Callable[..., str]) -> None:
        printed = run("data", "validate", small_corpus.train, small_corpus.validation)
        assert "24 utterances" in printed and "6 utterances" in printed
        assert re.search(r"utterances +30\b", run("data", "stats", small_corpus.train, small_corpus.validation))

    @pytest.mark.parametrize("name", ["index", "validate", "stats"])
    def test_missing_empty_and_wrong_files_are_named_by_every_command(self, name: str, tmp_path: Path) -> None:
        empty = tmp_path / "empty.jsonl"
        empty.touch()
        text = write_text(tmp_path / "text.jsonl")
        missing = tmp_path / "missing.jsonl"
        for path in (empty, text, missing):
            assert error_of("data", name, path).startswith(f"{path}: ")

    def test_stats_without_an_index_says_how_to_make_it(self, corpus: Path) -> None:
        index_path(corpus).unlink()
        assert error_of("data", "stats", corpus) == (
            f"{corpus}: has no index; create it with: w2vscale data index {corpus}"
        )

    def test_stats_with_settings_that_keep_nothing(self, corpus: Path) -> None:
        message = error_of("data", "stats", corpus, "--set", "data.min_seconds=12")
        assert message.startswith(f"{corpus}: no utterance is long enough")

    def test_an_index_that_cannot_be_written(self, corpus: Path) -> None:
        index_path(corpus).unlink()
        index_path(corpus).mkdir()
        assert error_of("data", "index", corpus).startswith(f"{index_path(corpus)}: cannot be written")


class TestTrain:
    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.chdir(tmp_path)

    def error(self, *arguments: object) -> str:
        return error_of("train", "tiny", *arguments)

    def test_without_a_corpus_the_setting_is_named(self) -> None:
        assert self.error("--exp", "exp") == "data.train names no manifest: set data.train=CUTS.jsonl"

    def test_a_wrong_key_or_value_leaves_no_folder_behind(self, tmp_path: Path) -> None:
        assert "did you mean optim.lr?" in self.error("optim.lrr=3", "--exp", "exp")
        assert "optim.lr='fast'" in self.error("optim.lr=fast", "--exp", "exp")
        assert not (tmp_path / "exp").exists()

    def test_a_missing_manifest_or_index_and_a_stale_index(self, corpus: Path) -> None:
        assert self.error("data.train=no.jsonl") == "no.jsonl: no such manifest"
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
        for exp in (blocked, blocked / "deeper"):
            assert self.error(f"data.train={corpus}", "--exp", exp).startswith(f"{exp}: the run's folder cannot be")

    def test_a_checkpoint_that_does_not_exist(self, corpus: Path) -> None:
        assert "no/checkpoint" in self.error(f"data.train={corpus}", "--resume", "no/checkpoint")

    def test_crops_that_cannot_be_masked(self, corpus: Path) -> None:
        message = self.error(f"data.train={corpus}", "data.max_seconds=0.2", "data.min_seconds=0.1")
        assert message.startswith("data.max_seconds=0.2: too short to be masked")

    def test_no_process_at_all(self, corpus: Path) -> None:
        assert self.error(f"data.train={corpus}", "--nproc-per-node", 0) == "--nproc-per-node 0: must be at least 1"


class TestOtherCommands:
    def test_evaluate_and_report_name_what_is_missing(self, corpus: Path, tmp_path: Path) -> None:
        assert str(tmp_path / "no") in error_of("evaluate", tmp_path / "no", "--cuts", corpus)
        assert str(tmp_path / "no") in error_of("report", tmp_path / "no")
