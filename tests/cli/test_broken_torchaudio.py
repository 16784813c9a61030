"""w2vscale works where torchaudio is installed and its import fails, as beside a CPU build of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.micro import MICRO_RUN

COMMANDS = """
import importlib.util, json, sys
from w2vscale.cli.app import app

if __name__ == "__main__":
    assert importlib.util.find_spec("torchaudio") is not None
    for arguments in json.load(sys.stdin):
        assert not app(args=arguments, standalone_mode=False), arguments
"""


def run(folder: Path, *commands: list[str]) -> None:
    """Run commands in a process that finds a torchaudio whose import raises OSError.

    `train` ends its process, so it comes last.
    """
    package = folder / "path" / "torchaudio"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text('raise OSError("libcudart.so: cannot open shared object file")\n')
    script = folder / "commands.py"
    script.write_text(COMMANDS)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(commands),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (package.parent, root)))},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_from_audio_to_exported_models(mixed_audio: Path, tmp_path: Path) -> None:
    """The audio is WAV, FLAC, MP3, Ogg and Opus, at several sampling rates."""
    cuts, shards, exp = (str(tmp_path / name) for name in ("cuts_train.jsonl", "shards", "exp"))
    settings = [*MICRO_RUN, "data.workers=1", "batch.micro_batches=1", "trainer.updates=4", "data.max_bad_fraction=0"]
    run(
        tmp_path,
        ["data", "prepare", "folder", str(mixed_audio), str(tmp_path)],
        ["data", "index", cuts],
        ["data", "validate", cuts, "--audio"],
        ["data", "shar", cuts, shards, "--format", "opus"],
        ["train", "base", f"data.train={shards}", "data.mode=stream", *settings, "--exp", exp],
    )
    forms = ("huggingface", "torchaudio")
    run(
        tmp_path,
        ["features", exp, str(mixed_audio), "-o", str(tmp_path / "features")],
        *(["export", exp, str(tmp_path / form), "--format", form] for form in forms),
    )
    assert len(list((tmp_path / "features").rglob("*.npy"))) == 6
    assert all((tmp_path / form / "model.safetensors").is_file() for form in forms)
