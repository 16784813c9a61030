"""The Python of an exported model card runs as it is, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.audio import noise, write_audio
from tests.helpers.exported import random_model, save_model
from tests.helpers.micro import SMALL
from w2vscale.checkpoint.format import TrainState
from w2vscale.config import Config, load_config
from w2vscale.inference.pretrained import load
from w2vscale.inference.transcription import Transcript, transcribe
from w2vscale.inference.utterances import find_utterances
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.models.lengths import output_frames

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="Transformers is not installed"
)

SAMPLES = 16_000


def exported(config: Config, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of random weights, and its export to Transformers with a recording beside it."""
    checkpoint = save_model(folder, config, random_model(config, seed=3).state_dict(), TrainState(update=7))
    export = folder / "export"
    export_checkpoint(checkpoint, export, form="huggingface")
    assert len({path.stat().st_mode for path in export.iterdir()}) == 1
    write_audio(export / "speech.wav", noise(SAMPLES / 16_000), subtype="FLOAT")
    return checkpoint, export


def output_of_card(export: Path) -> str:
    """Run the card's Python in the folder, as its reader does; return what it prints.

    -I: neither this process' modules nor its PYTHONPATH.
    """
    _, _, rest = (export / "README.md").read_text().partition("```python\n")
    python, fence, _ = rest.partition("```\n")
    assert fence
    done = subprocess.run(
        [sys.executable, "-I", "-c", python], cwd=export, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_card_of_a_pretrained_model_computes_hidden_states(tmp_path: Path) -> None:
    config = load_config("base", SMALL)
    _, export = exported(config, tmp_path)
    frames = output_frames(SAMPLES, config.model)
    assert output_of_card(export) == f"torch.Size([1, {frames}, {config.model.dim}])\n"


def test_the_card_of_a_fine_tuned_model_transcribes(tmp_path: Path) -> None:
    encoder = [setting for setting in SMALL if setting.startswith("model.")]
    config = load_config("large_lv60", [*encoder, "objective.name=ctc", "objective.vocabulary=letters"])
    checkpoint, export = exported(config, tmp_path)
    (expected,) = transcribe(load(checkpoint), find_utterances([export / "speech.wav"]))
    assert isinstance(expected, Transcript) and len(expected.text) > 5
    text = output_of_card(export)
    assert text.strip() == expected.text
