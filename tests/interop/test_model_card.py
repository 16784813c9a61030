"""The Python of an exported model card runs as it is, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.audio import noise, write_audio
from tests.helpers.micro import SMALL
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import Config, dump_config, load_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.inference.pretrained import load
from w2vscale.inference.transcription import Transcript, transcribe
from w2vscale.inference.utterances import find_utterances
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.models.lengths import output_frames
from w2vscale.objectives.contrastive_model import Wav2Vec2ForPretraining
from w2vscale.objectives.ctc import Wav2Vec2ForCTC
from w2vscale.optim.canonical import specs_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="Transformers is not installed"
)

SAMPLES = 16_000


def exported(model: nn.Module, config: Config, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of the model, and its export to Transformers with a recording beside it."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    store = CheckpointStore(folder / "checkpoints", Ranks(), expected=specs_of(tensors), keep_last=1)
    checkpoint = store.save(tensors, TrainState(update=7), dump_config(config))
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
    _, export = exported(Wav2Vec2ForPretraining(config.model), config, tmp_path)
    frames = output_frames(SAMPLES, config.model)
    assert output_of_card(export) == f"torch.Size([1, {frames}, {config.model.dim}])\n"


def test_the_card_of_a_fine_tuned_model_transcribes(tmp_path: Path) -> None:
    config = load_config("large_lv60", [*SMALL, "objective.name=ctc", "objective.vocabulary=letters"])
    torch.manual_seed(3)
    model = Wav2Vec2ForCTC(config.model, config.ctc)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint, export = exported(model, config, tmp_path)
    (expected,) = transcribe(load(checkpoint), [*find_utterances(export / "speech.wav")])
    assert isinstance(expected, Transcript) and len(expected.text) > 5
    text = output_of_card(export).replace("<s>", "").replace("</s>", "")
    assert text.strip() == expected.text
