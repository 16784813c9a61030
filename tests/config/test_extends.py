"""YAML files that extend others: what replaces what, and mistakes that name the files which led to them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.commands import error_of
from w2vscale.cli.app import app
from w2vscale.config import dump_config, load_config
from w2vscale.config.sources import MOST_FILES
from w2vscale.errors import UserError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problem(path: Path, *overrides: str) -> str:
    """The message of an error, which is one line."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_own_settings_replace_those_of_files_and_these_those_of_the_preset(tmp_path: Path) -> None:
    write(tmp_path / "common" / "data.yaml", "data: {train: [a.jsonl, b.jsonl], workers: 3}\noptim: {lr: 1.0e-3}\n")
    write(tmp_path / "common" / "long.yaml", "optim: {lr: 2.0e-3, eps: 1.0e-7}\ndata: {workers: 4}\n")
    run = write(
        tmp_path / "conf" / "run.yaml",
        "extends: [../common/data.yaml, ../common/long.yaml]\npreset: tiny\noptim: {eps: 1.0e-8}\n",
    )
    config, tiny = load_config(run, ["optim.weight_decay=0.5"]), load_config("tiny")
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (2e-3, 1e-8, 0.5)
    assert (config.data.workers, config.data.train) == (4, [Path("a.jsonl"), Path("b.jsonl")])
    assert config.model == tiny.model != load_config("base").model


def test_a_file_extends_one_that_extends_another_a_preset_or_a_run(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: tiny\ntrainer: {seed: 1}\noptim: {lr: 1.0e-3}\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\ntrainer: {seed: 2}\n")
    config = load_config(tmp_path / "b.yaml")
    assert (config.trainer.seed, config.optim.lr) == (2, 1e-3)
    assert config.model == load_config("tiny").model
    write(tmp_path / "exp" / "config.yaml", dump_config(config))
    extended = load_config(write(tmp_path / "c.yaml", "extends: exp\ndata: {workers: 1}\n"))
    assert extended == config.model_copy(update={"data": config.data.model_copy(update={"workers": 1})})


def test_another_objective_in_a_file_above_resets_the_settings_of_the_objective(tmp_path: Path) -> None:
    write(tmp_path / "pretraining.yaml", "preset: tiny\nobjective: {negatives: 7}\n")
    run = write(tmp_path / "run.yaml", "extends: pretraining.yaml\nobjective: {name: ctc, vocabulary: letters}\n")
    assert load_config(run).objective.model_dump() == {"name": "ctc", "vocabulary": "letters"}


def test_config_show_and_diff_see_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "common.yaml", "preset: tiny\noptim: {lr: 1.0e-3}\n")
    write(tmp_path / "run.yaml", "extends: common.yaml\ntrainer: {seed: 5}\n")
    shown = CliRunner().invoke(app, ["config", "show", "run.yaml"]).output
    assert "extends" not in shown and "seed: 5" in shown and "lr: 0.001" in shown
    different = CliRunner().invoke(app, ["config", "diff", "common.yaml", "run.yaml"]).output
    assert "trainer.seed" in different and "optim.lr" not in different


def test_config_show_takes_the_folder_of_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    config = load_config("tiny", ["optim.lr=3e-3"])
    checkpoint = tmp_path / "exp" / "checkpoints" / "update_00000004"
    write(checkpoint / "config.yaml", dump_config(config))
    (tmp_path / "exp" / "checkpoints" / "latest").symlink_to(checkpoint.name)
    for folder in (tmp_path / "exp", checkpoint, checkpoint.parent):
        shown = CliRunner().invoke(app, ["config", "show", str(folder), "optim.eps=0.5"]).output
        assert "lr: 0.003" in shown and "eps: 0.5" in shown
    write(tmp_path / "exp" / "config.yaml", dump_config(load_config("tiny", ["optim.lr=4e-3"])))
    assert "lr: 0.004" in CliRunner().invoke(app, ["config", "show", str(tmp_path / "exp")]).output
    assert "neither a file nor a preset" in error_of("config", "show", tmp_path / "ex")


class TestMistakes:
    def test_name_the_files_that_led_to_them(self, tmp_path: Path) -> None:
        run, inner = tmp_path / "run.yaml", tmp_path / "sub" / "common.yaml"
        write(run, "extends: sub/common.yaml\n")
        write(inner, "extends: [tiny, mising.yaml]\n")
        write(tmp_path / "sub" / "missing.yaml", "preset: tiny\n")
        chain = f"{run}: extends sub/common.yaml: extends mising.yaml: "
        assert problem(run).startswith(f"{chain}neither a file nor a preset; did you mean {inner.parent}/missing.yaml?")
        for text, message in (
            ("optim: {lr: fast}\n", "optim.lr='fast': "),
            ("optim: {lrr: 1}\n", "optim.lrr: unknown setting; did you mean optim.lr?"),
            ("preset: tinny\n", "preset: tinny: unknown; did you mean tiny?"),
            ("optim: [\n", "not valid YAML: line 2"),
            ("", "has no settings"),
        ):
            write(inner, text)
            assert problem(run).startswith(f"{run}: extends sub/common.yaml: {message}")
        write(inner, "preset: tiny\noptim: {lr: 1e-3}\n")
        assert problem(run, "optim.lr=fast").startswith("override: optim.lr='fast'")
        for value in ("fast", "null"):
            write(run, f"extends: sub/common.yaml\noptim: {{lr: {value}}}\n")
            assert problem(run).startswith(f"{run}: optim.lr={value!r}" if value != "null" else f"{run}: optim.lr=")

    def test_a_cycle_is_refused(self, tmp_path: Path) -> None:
        run = write(tmp_path / "run.yaml", "extends: a.yaml\n")
        write(tmp_path / "a.yaml", "extends: run.yaml\n")
        assert problem(run) == f"{run}: extends a.yaml: extends run.yaml: extends itself"
        write(run, "extends: ./run.yaml\n")
        assert problem(run) == f"{run}: extends ./run.yaml: extends itself"

    def test_so_are_files_without_end(self, tmp_path: Path) -> None:
        """Two references in each file: 2^30 files if all were read."""
        for number in range(30):
            write(tmp_path / f"{number}.yaml", f"extends: [{number + 1}.yaml, {number + 1}.yaml]\n")
        write(tmp_path / "30.yaml", "preset: tiny\n")
        assert problem(tmp_path / "0.yaml").endswith(f"extends more than {MOST_FILES} files")

    @pytest.mark.parametrize("value", ["3", "{a: b}", "[tiny, 3]", "''", "['']"])
    def test_other_values_are_refused(self, value: str, tmp_path: Path) -> None:
        run = write(tmp_path / "run.yaml", f"extends: {value}\npreset: tiny\n")
        assert problem(run).endswith("expected a YAML file, a preset, or a list of them")

    def test_a_run_or_checkpoint_extends_nothing(self, tmp_path: Path) -> None:
        """It may be a stranger's, and names of other files would be read from it."""
        write(tmp_path / "secret.yaml", "preset: tiny\n")
        config = write(tmp_path / "exp" / "config.yaml", "extends: ../secret.yaml\n")
        assert "extends: no run writes this" in problem(config.parent)
        write(config.with_name("train_state.json"), "{}")
        assert "extends: no run writes this" in problem(config)
