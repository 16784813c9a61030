"""The command line: help, processes, and the commands about settings. A user error is one line and exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.commands import command, error_of
from tests.helpers.tiers import long
from w2vscale.cli.app import app, main
from w2vscale.cli.arguments import check_dashes
from w2vscale.cli.progress import console
from w2vscale.config import dump_config, load_config, preset_names
from w2vscale.data.manifest import index_path
from w2vscale.errors import UserError
from w2vscale.objectives import OBJECTIVES, all_settings, resolve
from w2vscale.terminal import CONTROL
from w2vscale.version import __version__

SETTINGS = [row[0] for table in all_settings().values() for row in table]
HEAVY = ("torch", "deepspeed", "transformers", "torchaudio", "lhotse", "matplotlib", "tensorboard", "soundfile")

INTERRUPT = """
import os
import signal
import sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""
"""Sends SIGINT when a module is imported, as a `sitecustomize`: a module that Python runs before the program."""


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
            ("doctor",),
        ],
        ids=" ".join,
    )
    def test_every_command_has_help(self, arguments: tuple[str, ...]) -> None:
        for option in ("--help", "-h"):
            result = CliRunner().invoke(app, [*arguments, option])
            assert result.exit_code == 0
            assert "Usage:" in result.output

    def test_a_group_without_a_command_shows_its_help(self) -> None:
        for arguments in ([], ["data"], ["config"], ["data", "prepare"]):
            assert "Commands" in CliRunner().invoke(app, arguments).output

    def test_version_names_torch_and_cuda(self, run: Callable[..., str]) -> None:
        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        assert run("--version") == f"w2vscale {__version__}, torch {torch.__version__}, {cuda}\n"

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
for arguments in (["--help"], ["data", "prepare", "--help"], ["train", "--help"], ["doctor", "--help"], ["--version"]):
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
    def test_ctrl_c_during_imports_is_no_traceback(self, tmp_path: Path) -> None:
        for module in ("typer", "w2vscale.cli.data", "w2vscale.config"):
            (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(module=module))
            path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
            done = subprocess.run(
                [sys.executable, "-m", "w2vscale", "config", "presets"],
                env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (130, "interrupted\n"), module

    def test_a_user_error_is_one_line_and_exit_code_2(self) -> None:
        done = command("config", "show", "base", "optim.lr=fast")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: override: optim.lr='fast': ")
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize("place", [long(0), 4], ids=["first", "last"])
    def test_debug_shows_the_traceback(self, place: int) -> None:
        arguments = ["config", "show", "base", "optim.lr=fast"]
        arguments.insert(place, "--debug")
        done = command(*arguments)
        assert done.returncode not in (0, 2)
        assert "Traceback" in done.stderr and "load_config" in done.stderr

    @pytest.mark.distributed
    def test_an_error_of_all_processes_is_printed_once(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        settings = [f"data.train={small_corpus.train}", "batch.micro_batches=3"]
        done = command("train", "tiny", *settings, "--exp", tmp_path / "exp", "--nproc-per-node", 2)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith("error: batch.micro_batches=3 is not a multiple of 2 processes: ")

    def test_a_bad_manifest_ends_validation_with_exit_code_2(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "a.wav", noise(1.0))
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path)])
        write_text(path)
        done = command("data", "validate", manifest)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {manifest}: 1 bad utterance of 1, listed in {manifest}.bad_headers; "
            f"the first one: a ({path}): not readable as audio: Format not recognised\n"
        )

    def test_names_from_a_manifest_do_not_command_the_terminal(self, tmp_path: Path) -> None:
        """One is printed in the table of what is bad, the other in the error."""
        path = write_audio(tmp_path / "a.wav", noise(1.0))
        names = "\x1b]0;another title\x07", "red \x9b31m"
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path, identifier=name) for name in names])
        write_text(path)
        done = command("data", "validate", manifest)
        assert done.returncode == 2
        printed = done.stdout + done.stderr
        assert r"\u001b]0;another title\u0007" in printed and r"red \u009b31m" in printed
        assert not CONTROL.search(printed)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["train", "tiny", "data.train=cuts.jsonl", "--exp", "exp"],
            ["finetune", "ctc_1h", "trainer.init_from=exp/base", "data.train=cuts.jsonl"],
            ["evaluate", "exp/base", "--cuts", "cuts.jsonl"],
            ["transcribe", "exp/base", "speech.wav", "--format", "json"],
        ],
        ids=lambda arguments: arguments[0],
    )
    def test_processes_are_launched_with_the_same_arguments(
        self, arguments: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert corpus == tmp_path / "cuts.jsonl"  # what is missing is refused before processes start
        (tmp_path / "exp" / "base").mkdir(parents=True)
        (tmp_path / "speech.wav").touch()
        monkeypatch.chdir(tmp_path)
        given = [*arguments, "--nproc-per-node", "2"]
        launches: list[tuple[list[str], int]] = []

        def launch(arguments: list[str], processes: int, *, grace: float) -> int:
            assert grace > 0
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

    @pytest.mark.parametrize(
        ("environment", "here"),
        [
            ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, ", 4 on each machine"),
            ({"RANK": "0", "WORLD_SIZE": "2"}, ""),
            (
                {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
                ", 1 on each machine",
            ),
        ],
    )
    def test_another_number_of_processes_than_the_launchers_is_refused(
        self, environment: dict[str, str], here: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """srun with one task per machine would train with one process on each."""
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert error_of("evaluate", tmp_path, "--cuts", corpus, "--nproc-per-node", 2) == (
            "--nproc-per-node 2: torchrun, DeepSpeed, SLURM or Kubernetes has started the processes already"
            f"{here} (RANK or SLURM_STEP_NUM_TASKS is set); leave out this option"
        )


class TestDashes:
    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (["train", "tiny", "--data.train=x.jsonl"], "data.train=x.jsonl"),
            (["train", "tiny", "--optim.lr", "1e-4", "--exp", "a"], "optim.lr=1e-4"),
            (["train", "tiny", "-batch.concat=2"], "batch.concat=2"),
            (["train", "tiny", "--mix.weights.sv=2"], "mix.weights.sv=2"),
            (["train", "tiny", "--data.train", "--exp", "a"], "data.train=VALUE"),
            (["config", "show", "tiny", "--trainer.seed"], "trainer.seed=VALUE"),
            (["data", "stats", "a.jsonl", "--set", "--data.min_seconds=1"], "data.min_seconds=1"),
            (["train", "tiny", "—data.train=a=b"], "data.train=a=b"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_a_setting_with_dashes(self, arguments: list[str], hint: str) -> None:
        with pytest.raises(UserError, match=rf"^-?\S+: settings are given without dashes: {re.escape(hint)}$"):
            check_dashes(arguments)

    @pytest.mark.parametrize(
        ("argument", "name", "meant"),
        [
            ("–exp", "EN DASH (U+2013)", "--exp"),
            ("—resume=never", "EM DASH (U+2014)", "--resume=never"),
            ("-–exp", "EN DASH (U+2013)", "--exp"),
            ("−5", "MINUS SIGN (U+2212)", "-5"),
            ("‐h", "HYPHEN (U+2010)", "-h"),
            ("--dry‑run", "NON-BREAKING HYPHEN (U+2011)", "--dry-run"),
            ("--nproc–per—node=2", "EN DASH (U+2013)", "--nproc-per-node=2"),
            ("――scratch", "HORIZONTAL BAR (U+2015)", "--scratch"),
        ],
    )
    def test_a_dash_of_a_word_processor(self, argument: str, name: str, meant: str) -> None:
        with pytest.raises(UserError) as caught:
            check_dashes(["train", "tiny", argument, "exp/a"])
        assert str(caught.value) == (
            f"{argument}: has {name} where an option has '-'; write {meant}, or ./{argument} if it is a file"
        )

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["train", "tiny", "data.train=a–b.jsonl", "--exp", "exp/a–b", "--exp=–a", "-h", "-", "–", "--", "–x"],
            ["transcribe", "exp", "--", "--data.train=x", "—"],
            ["transcribe", "exp", "-speech.wav", "--beam", "5", "exp/–x", "./–x", "–found.wav"],
        ],
        ids=" ".join,
    )
    def test_other_arguments(self, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("–found.wav").touch()
        check_dashes(arguments)

    def test_every_command_checks_them(self) -> None:
        done = command("checkpoint", "show", "exp", "--data.workers=2")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: --data.workers=2: settings are given without dashes: data.workers=2\n"


class TestConfigCommands:
    @pytest.mark.parametrize("preset", ["large", "ctc_1h"])
    def test_show_prints_all_settings_and_can_be_loaded(
        self, preset: str, run: Callable[..., str], tmp_path: Path
    ) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(run("config", "show", preset, "optim.lr=1e-4", "data.train=a.jsonl"))
        resolved, _ = resolve(load_config(preset, ["optim.lr=1e-4", "data.train=a.jsonl"]))
        assert load_config(path) == resolved
        assert path.read_text() == dump_config(resolved) == run("config", "show", path)

    @pytest.mark.parametrize("name", ["presets", "keys"])
    def test_tables_cut_no_name_on_a_narrow_terminal(
        self, name: str, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console, "width", 80)
        lines = run("config", name).splitlines()
        names = preset_names() if name == "presets" else SETTINGS
        assert set(names) <= {line.split()[0] for line in lines if line.strip()}
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)

    def test_presets_lists_each_with_its_parameters(self, run: Callable[..., str]) -> None:
        rows = {line.split()[0]: line for line in run("config", "presets").splitlines()[1:]}
        assert list(rows) == preset_names()
        assert "95,044,608" in rows["base"]
        for name, row in rows.items():
            if name.startswith("ctc"):
                assert row.split()[1:3] == ["of", "init_from"]
            else:
                assert int(row.split()[1].replace(",", "")) > 10**6

    def test_diff_lists_what_differs_between_presets_with_its_meaning(self, run: Callable[..., str]) -> None:
        lines = run("config", "diff", "base", "fairseq_base").splitlines()
        assert lines[0].split() == ["setting", "base", "fairseq_base", "meaning"]
        rows = {line.split()[0]: line.split()[1:4] for line in lines[1:] if line.startswith(" ") and "." in line[:25]}
        assert rows["optim.max_norm"] == ["1.0", "null", "clip"]
        assert rows["objective.mask_trim"] == ["none", "micro_batch", "micro_batch:"]
        assert rows["schedule.final_ratio"][:2] == ["0.1", "0.0"]
        assert rows.keys() == {
            "model.waveform_eps", "objective.mask_trim", "optim.max_norm", "optim.decay_vectors", "schedule.kind",
            "schedule.first_step", "schedule.final_ratio",
        }  # fmt: skip

    def test_diff_takes_files_and_runs(self, run: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("preset: ctc_1h\noptim: {lr: 2.0e-5}\n")
        (tmp_path / "exp").mkdir()
        (tmp_path / "exp" / "config.yaml").write_text(run("config", "show", "ctc_1h"))
        printed = run("config", "diff", tmp_path / "mine.yaml", tmp_path / "exp").splitlines()
        assert [line.split()[:3] for line in printed[-1:]] == [["optim.lr", "2.0e-05", "5.0e-05"]]
        assert "have the same settings" in run("config", "diff", "ctc_1h", tmp_path / "exp")
        (tmp_path / "averaged" / "checkpoints" / "latest").mkdir(parents=True)
        (tmp_path / "exp" / "config.yaml").rename(tmp_path / "averaged" / "checkpoints" / "latest" / "config.yaml")
        for path in (tmp_path / "averaged", tmp_path / "averaged" / "checkpoints"):
            assert "have the same settings" in run("config", "diff", "ctc_1h", path)
        assert f"{tmp_path}: has no config.yaml; give the folder" in error_of("config", "diff", "ctc_1h", tmp_path)

    def test_diff_of_two_objectives_leaves_out_what_one_does_not_have(self, run: Callable[..., str]) -> None:
        lines = run("config", "diff", "base", "best_rq_base").splitlines()
        rows = {line.split()[0]: line.split()[1:] for line in lines}
        assert rows["objective.name"] == ["wav2vec2", "best_rq", "training", "objective"]
        assert rows["objective.codebook_entries"][:2] == ["320", "8192"]
        assert rows["objective.negatives"][:2] == ["100", "number"]
        assert rows["objective.mel_bins"][:2] == ["80", "number"]

    def test_keys_lists_every_setting_with_its_default(self, run: Callable[..., str]) -> None:
        rows = {line.split()[0]: line for line in run("config", "keys").splitlines()}
        for key, kind, default, _ in (row for table in all_settings().values() for row in table):
            if not key.startswith("objective."):
                assert kind in rows[key]
                assert default[:20] in rows[key]

    def test_keys_lists_the_settings_of_each_objective(self, run: Callable[..., str]) -> None:
        printed = run("config", "keys")
        tables = printed.split("objective with objective.name=")[1:]
        assert [table.split()[0] for table in tables] == list(OBJECTIVES)
        for table, kind in zip(tables, OBJECTIVES.values(), strict=True):
            listed = [line.split()[0] for line in table.splitlines() if line.strip().startswith("objective.")]
            assert listed == [f"objective.{key}" for key in kind.Settings.model_fields]

    @pytest.mark.parametrize(
        ("arguments", "start"),
        [
            (["base", "optim.lrr=1"], "override: optim.lrr: unknown setting; did you mean optim.lr?"),
            (["base", "optim.lr=fast"], "override: optim.lr='fast': "),
            (["base", "optim.lr"], "optim.lr: an override has the form section.key=value"),
            (
                ["base", "objective.negative=1"],
                "override: objective.negative: unknown setting; did you mean objective.negatives?",
            ),
            (["base", "objective.name=bert"], "override: objective.name='bert': Input should be 'wav2vec2', "),
            (["base", "objective.name=ctc"], "objective.vocabulary is empty; use a fine-tuning preset such as ctc_1h"),
            (["base", "objective.codebooks=3"], "override: objective: codebooks=3 does not divide codevector_dim=256"),
            (["base", "trainer.updates=9"], "override: schedule.warmup_updates=32000 is above trainer.updates=9"),
            (["bsae"], "bsae: neither a file nor a preset; did you mean base?"),
            (["missing/run.yaml"], "missing/run.yaml: neither a file nor a preset"),
        ],
    )
    def test_errors_are_one_line(self, arguments: list[str], start: str) -> None:
        assert error_of("config", "show", *arguments).startswith(start)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "tiny", "data.train={cuts_trian.jsonl}"],
        ["train", "tiny", "data.train={cuts_train.jsonl}", "data.validation=[{cuts_train.jsnol}]"],
        ["train", "tiny", "data.mode=stream", "data.train={shadrs}"],
        ["train", "tiny", "data.train={cuts_train.jsonl}", "trainer.init_from={exp/bsae}"],
        ["train", "tiny", "data.train={cuts_train.jsonl}", "--resume", "{exp/bsae}"],
        ["config", "show", "ctc_1h", "objective.vocabulary={leters.txt}"],
        ["evaluate", "{exp/bsae}", "--cuts", "{cuts_train.jsonl}"],
        ["transcribe", "{exp/bsae}", "{cuts_train.jsonl}"],
        ["report", "{exp/bsae}"],
        ["results", "{exp/reslts.json}"],
        ["replay", "{exp/nonfinte}"],
        ["export", "{exp/bsae}", "out"],
        ["import", "{exp/bsae}", "out", "--format", "huggingface"],
        ["import", "{modle.pt}", "out", "--format", "fairseq"],
        ["checkpoint", "show", "{exp/bsae/checkpoints/latest}"],
        ["checkpoint", "verify", "{exp/bsae}"],
        ["data", "stats", "{cuts_tran.jsonl}"],
        ["data", "index", "{cuts_tran.jsonl}"],
        ["data", "prepare", "folder", "{shadrs}", "out"],
    ],
    ids=" ".join,
)
def test_a_path_that_does_not_exist_names_the_nearest(
    arguments: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("exp/base", "exp/nonfinite", "shards"):
        Path(folder).mkdir(parents=True)
    for file in ("letters.txt", "exp/results.json", "exp/base/metrics.jsonl", "model.pt"):
        Path(file).touch()
    corpus.rename("cuts_train.jsonl")
    index_path(corpus).rename(index_path(Path("cuts_train.jsonl")))
    message = error_of(*(argument.replace("{", "").replace("}", "") for argument in arguments))
    asked = next(match[1] for word in arguments if (match := re.search("{(.*)}", word)) and not Path(match[1]).exists())
    assert asked in message
    assert re.search(r"; did you mean (cuts_train.jsonl|shards|letters.txt|model.pt|exp/\w+[^ ]*)\?", message)
