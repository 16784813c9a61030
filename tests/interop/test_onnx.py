"""onnxruntime computes with an exported graph what w2vscale computes with the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from tests.helpers.audio import write_audio
from tests.helpers.exported import random_model, save_model
from tests.helpers.micro import SMALL
from w2vscale.checkpoint.format import TrainState
from w2vscale.cli.app import app
from w2vscale.config import Config, load_config
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import Pretrained, load
from w2vscale.inference.transcription import Transcript, transcribe
from w2vscale.inference.utterances import find_utterances
from w2vscale.interop import onnx
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.models.lengths import input_samples, output_frames

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

ENCODER = [setting for setting in SMALL if setting.startswith("model.")]
CTC = ("objective.name=ctc", "objective.vocabulary=letters", "objective.split=longest")


def settings(preset: str, *overrides: str) -> Config:
    small = ENCODER if "objective.name=ctc" in overrides else SMALL
    return load_config(preset, [*small, "model.layers=2", *overrides])


def saved(config: Config, folder: Path) -> Path:
    """A checkpoint of random weights."""
    return save_model(folder / "run", config, random_model(config, seed=3).state_dict(), TrainState(update=7))


def computed(path: Path, waveforms: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Compute a batch. Its padding is not silent."""
    session = onnxruntime.InferenceSession(path)
    lengths = np.array([len(one) for one in waveforms])
    batch = np.full((len(waveforms), max(lengths)), 9.0, np.float32)
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform
    found: list[NDArray[np.float32]] = session.run(None, {"waveforms": batch, "lengths": lengths})
    return found


@torch.no_grad()
def expected(pretrained: Pretrained, waveform: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Compute an utterance alone, with the kernels of this machine: hidden states and, if it has any, logits."""
    config, objective = pretrained.config.model, pretrained.objective
    (last_TD,) = pretrained.features(waveform, config.sampling_rate, layers=config.layers).values()
    norm = pretrained.model.encoder.transformer.final_norm
    hidden_TD = last_TD if norm is None else norm(last_TD)
    logits = [objective.logits(pretrained.model, last_TD).numpy()] if objective.vocabulary else []
    return [hidden_TD.numpy(), *logits]


def compare(checkpoint: Path, path: Path) -> None:
    """Several lengths and batch sizes, from one frame on."""
    pretrained = load(checkpoint)
    model, draws = pretrained.config.model, np.random.default_rng(0)
    one = input_samples(1, model)
    for lengths in ((4001,), (one,), (one, one + 700, 2345), (3000, 3000), (16_000, one + 3)):
        # With an offset and another scale, so that normalisation matters.
        waveforms = [0.3 * draws.standard_normal(length, dtype=np.float32) + 0.2 for length in lengths]
        hidden, frames, *logits = computed(path, waveforms)
        assert frames.tolist() == [output_frames(length, model) for length in lengths]
        for row, waveform in enumerate(waveforms):
            wanted = expected(pretrained, waveform)
            assert len(wanted) == 1 + len(logits)
            for outputs, ours in zip((hidden, *logits), wanted, strict=True):
                assert ours.shape == outputs[row, : frames[row]].shape
                assert np.abs(outputs[row, : frames[row]] - ours).max() <= 1e-4
                assert not outputs[row, frames[row] :].any()


@pytest.fixture(scope="module")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Path, str]:
    """A model with LayerNorm everywhere, biases and normalised waveforms: settings, checkpoint, export, output."""
    folder = tmp_path_factory.mktemp("ctc")
    config = settings("large_lv60", *CTC, "model.waveform_eps=1e-5")
    checkpoint = saved(config, folder)
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(folder / "onnx"), "--format", "onnx"])
    assert result.exit_code == 0, result.output
    return config, checkpoint, folder / "onnx", result.output


def test_a_ctc_model(ctc: tuple[Config, Path, Path, str]) -> None:
    config, checkpoint, folder, output = ctc
    assert config.model.norm_first and config.model.conv_bias and config.model.normalize_waveform
    compare(checkpoint, folder / "model.onnx")
    assert "onnxruntime computes the same as PyTorch, within " in output


def test_its_files(ctc: tuple[Config, Path, Path, str]) -> None:
    config, _, folder, output = ctc
    names = {"README.md", "model.json", "model.onnx", "vocabulary.txt"}
    assert {path.name for path in folder.iterdir()} == names and all(f"{folder / name}: " in output for name in names)
    assert (folder / "vocabulary.txt").read_text().split() == load(ctc[1]).objective.vocabulary
    described = json.loads((folder / "model.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for described_ones, ones in (
        (described["inputs"], session.get_inputs()),
        (described["outputs"], session.get_outputs()),
    ):
        types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        assert {name: (types[kind], shape) for name, (kind, shape) in described_ones.items()} == {
            one.name: (one.type, one.shape) for one in ones
        }
    assert described["sampling_rate"] == 16_000
    assert described["w2vscale"]["model"] == config.model.model_dump(mode="json")
    assert output_frames(described["shortest_samples"], config.model) == 1


def test_the_python_of_its_card_transcribes(ctc: tuple[Config, Path, Path, str]) -> None:
    _, checkpoint, folder, _ = ctc
    write_audio(folder / "speech.wav", np.random.default_rng(1).standard_normal(16_000) * 0.1, subtype="FLOAT")
    (wanted,) = transcribe(load(checkpoint), find_utterances([folder / "speech.wav"]))
    assert isinstance(wanted, Transcript) and len(wanted.text) > 5
    card = (folder / "README.md").read_text()
    python = card.partition("```python\n")[2].partition("```\n")[0]
    done = subprocess.run(
        [sys.executable, "-I", "-c", python], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == wanted.text.split()
    assert "library_name: onnx\n" in card


def test_the_example_of_the_documentation(
    ctc: tuple[Config, Path, Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "interoperability.md").read_text()
    (python,) = (block for block in page.split("```python\n")[1:] if "onnxruntime" in block.partition("```")[0])
    (tmp_path / "DIR").symlink_to(ctc[2])
    write_audio(tmp_path / "speech.wav", np.random.default_rng(1).standard_normal(16_000) * 0.1, subtype="FLOAT")
    monkeypatch.chdir(tmp_path)
    exec(python.partition("```")[0], {})
    (wanted,) = transcribe(load(ctc[1]), find_utterances([tmp_path / "speech.wav"]))
    assert isinstance(wanted, Transcript) and capsys.readouterr().out.split() == wanted.text.split()


@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [
        settings("base"),  # GroupNorm, post-LN
        settings("base", *CTC, "model.conv_bias=true", "model.normalize_waveform=true"),
        settings("base_prenorm", "model.conv_norm_groups=8"),  # GroupNorm of several channels, padded convolutions
        settings("base_prenorm", *CTC, "model.conv_norm=layer", "model.conv_bias=false"),
        settings("large_lv60", "model.norm_first=false", "model.embedding_norm=true", "model.conv_bias=false"),
        settings("tiny", "model.max_frames=900"),
        load_config("best_rq_tiny", [*ENCODER, "model.layers=1"]),
    ],
    ids=lambda config: f"{config.objective.name}, {config.model.conv_norm}, norm_first={config.model.norm_first}",
)
def test_every_architecture(config: Config, tmp_path: Path) -> None:
    checkpoint = saved(config, tmp_path)
    export_checkpoint(checkpoint, tmp_path / "onnx", form="onnx")
    compare(checkpoint, tmp_path / "onnx" / "model.onnx")


@pytest.mark.long
def test_weights_of_large_models_have_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "ONE_FILE_BYTES", 1000)
    checkpoint = saved(settings("base", "model.layers=1"), tmp_path)
    found = export_checkpoint(checkpoint, tmp_path / "onnx", form="onnx")
    sizes = {file.name: file.stat().st_size for file in found.files}
    assert sizes["model.onnx.data"] > 100_000
    (tmp_path / "onnx").rename(tmp_path / "moved")
    compare(checkpoint, tmp_path / "moved" / "model.onnx")


def test_a_graph_that_differs_is_refused(ctc: tuple[Config, Path, Path, str]) -> None:
    config, _, folder, _ = ctc
    example = onnx._example(config.model)
    found = computed(folder / "model.onnx", [one[:n].numpy() for one, n in zip(*example, strict=True)])
    outputs = dict(zip(("hidden", "frames", "logits"), map(torch.from_numpy, found), strict=True))
    lines: list[str] = []
    onnx.check(folder / "model.onnx", example, outputs, lines.append)
    assert len(lines) == 1
    outputs["logits"] = outputs["logits"] + 0.01
    with pytest.raises(
        UserError, match=r"model\.onnx: onnxruntime \S+ differs from PyTorch in logits, by \d\.\de-0\d of"
    ):
        onnx.check(folder / "model.onnx", example, outputs, lines.append)


def test_without_onnxscript_one_line_says_what_to_install(
    ctc: tuple[Config, Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript is not installed: pip install 'w2vscale\[onnx\]'"):
        export_checkpoint(ctc[1], tmp_path / "onnx", form="onnx")
    assert not (tmp_path / "onnx").exists()
