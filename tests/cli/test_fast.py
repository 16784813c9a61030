"""What a command can answer at once, it answers before it imports a large library. Libraries are named, not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer.main

from tests.helpers.commands import command
from w2vscale.cli.app import app

SLOW = (
    "torch", "lhotse", "transformers", "deepspeed", "matplotlib", "tensorboard", "pandas", "scipy", "sklearn",
    "tensorflow", "torchaudio", "datasets", "onnx", "onnxruntime", "wandb", "mlflow",
)  # fmt: skip
SCRIPT = f"""
import functools, json, sys
import typer.main
typer.main.get_command = functools.cache(typer.main.get_command)  # before typer.testing, as in conftest.py
from typer.testing import CliRunner
from w2vscale.cli.app import app
found = []
for line in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, line)
    slow = sorted(sys.modules.keys() & {set(SLOW)!r})
    found.append([line, result.exit_code, str(result.exception) if result.exit_code else result.output, slow])
    for module in [name for name in sys.modules if name.partition(".")[0] in slow]:
        del sys.modules[module]
print(json.dumps(found))
"""
"""Runs several commands in one process; of each its exit code, its error or output, and the slow imports."""


def outcomes(lines: list[list[str]]) -> list[tuple[list[str], int, str, list[str]]]:
    done = command(json.dumps(lines), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    return [tuple(each) for each in json.loads(done.stdout)]


def commands_of(group: Any, *names: str) -> list[list[str]]:
    """A group and all commands below it."""
    below = getattr(group, "commands", {}).items()
    return [[*names], *(line for name, each in below for line in commands_of(each, *names, name))]


def test_help_imports_no_large_library() -> None:
    lines = [[*names, "--help"] for names in commands_of(typer.main.get_command(app))]
    assert len(lines) > 30
    for line, code, output, slow in outcomes(lines):
        assert code == 0 and "Usage: " in output and not slow, (line, slow)


def test_a_version_or_a_wrong_name_imports_no_large_library() -> None:
    *others, version = outcomes([["trian"], ["train", "tiny", "--exq", "x"], ["config", "show", "no"], ["--version"]])
    assert version[1] == 0
    for line, code, _, slow in others:
        assert code and not slow, (line, slow)


def test_refusals_import_no_large_library(corpus: Path, tmp_path: Path) -> None:
    missing, used = tmp_path / "no", tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    (tmp_path / "imported" / "checkpoints" / "update_00000000").mkdir(parents=True)
    cuts, exp = f"{missing}.jsonl", f"--exp={tmp_path / 'exp'}"
    refusals = {
        ("train", "no", exp): "no: neither a file nor a preset",
        ("train", "tiny", "optim.lrr=3", exp): "did you mean optim.lr?",
        ("train", "tiny", "objective.negative=3", exp): "did you mean objective.negatives?",
        ("train", "tiny", exp): "data.train names no manifest",
        ("train", "tiny", f"data.train={cuts}", exp): f"{cuts}: no such manifest",
        ("train", "tiny", f"data.train={cuts}", "--nproc-per-node=2", exp): f"{cuts}: no such manifest",
        ("train", "tiny", f"data.train={corpus}", f"data.validation={cuts}", exp): f"{cuts}: no such manifest",
        (
            "train",
            "tiny",
            f"data.train={corpus}",
            f"data.validation={corpus}",
            f"data.validation_sets.other={cuts}",
            exp,
        ): f"{cuts}: no such manifest",
        ("finetune", "ctc_1h", f"objective.vocabulary={missing}", exp): f"objective.vocabulary={missing}: ",
        ("finetune", "ctc_1h", f"data.train={cuts}", exp): f"{cuts}: no such manifest",
        ("plan", "no", "--gpus=8", "--gpu-memory=80"): "no: neither a file nor a preset",
        ("plan", "tiny", "optim.lr=fast", "--gpus=8", "--gpu-memory=80"): "optim.lr='fast'",
        ("export", str(missing), str(tmp_path / "new")): f"{missing}: no such checkpoint",
        ("export", str(used), str(used)): f"{used}: exists and is not an empty folder",
        ("import", str(missing), str(tmp_path / "new")): f"{missing}: no such folder",
        ("import", str(used), str(tmp_path / "imported")): "checkpoints: exists; choose another folder",
        ("evaluate", str(missing), "--cuts", str(corpus)): f"{missing}: no such checkpoint",
        ("evaluate", str(used), "--cuts", cuts): f"{cuts}: no such manifest",
        ("evaluate", str(used), "--cuts", cuts, "--wer"): f"{cuts}: no such manifest",
        ("transcribe", str(missing), "a.wav"): f"{missing}: no such checkpoint",
        ("transcribe", str(used), cuts): f"{cuts}: no such file; 1 of 1 utterances could not be used",
        ("transcribe", str(used), str(corpus), "--channel=left"): "--channel left: choose mean, first",
        ("features", str(used), cuts, "-o", str(missing)): f"{cuts}: no such file",
        ("probe", str(used), "--train", cuts, "--test", str(corpus), "-o", str(missing)): f"{cuts}: no such manifest",
        ("report", str(missing)): f"{missing}: no such run",
        ("report", str(used), "--output=curves.png"): "--output curves.png: the report is an HTML file",
        ("checkpoint", "show", str(missing)): f"{missing}: no such checkpoint",
        ("checkpoint", "verify", str(missing)): f"{missing}: no such checkpoint",
        ("checkpoint", "consolidate", str(missing), str(tmp_path / "new")): f"{missing}: no such checkpoint",
    }
    found = outcomes([list(line) for line in refusals])
    for (line, code, error, slow), message in zip(found, refusals.values(), strict=True):
        assert code == 1 and message in error and not slow, (line, code, error, slow)
    assert not any((tmp_path / name).exists() for name in ("exp", "new", "no"))
