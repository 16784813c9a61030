"""`transcribe` keeps in memory only what it prints at the end."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.audio import noise, write_audio
from tests.helpers.exported import random_model, save_model
from tests.helpers.spelled import SPELLING
from w2vscale.checkpoint.format import TrainState
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.inference import transcript_formats
from w2vscale.inference.transcription import Transcript


@pytest.mark.parametrize("form", ["txt", "json"])
def test_a_line_that_is_printed_is_not_kept(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("base", [*SPELLING, "precision.compute=fp32"])
    save_model(tmp_path / "exp", config, random_model(config, seed=3).state_dict(), TrainState(update=7))
    for number in range(8):
        write_audio(tmp_path / "audio" / f"{number}.wav", noise(0.3, seed=number))
    seen: list[weakref.ref[Transcript]] = []
    alive: list[int] = []
    formatted = transcript_formats.line_of

    def line_of(transcript: Transcript, form: str) -> str:
        seen.append(weakref.ref(transcript))
        alive.append(sum(reference() is not None for reference in seen))
        return formatted(transcript, form)

    monkeypatch.setattr(transcript_formats, "line_of", line_of)
    arguments = ["--format", form, "--batch-seconds", "0.3"]
    result = CliRunner().invoke(app, ["transcribe", str(tmp_path / "exp"), str(tmp_path / "audio"), *arguments])
    assert result.exit_code == 0 and len(alive) == 8
    assert max(alive) <= 3, alive
