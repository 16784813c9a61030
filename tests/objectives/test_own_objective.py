"""An objective of a user's own: one class and one line of the registry, and everything else works with it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from lhotse.cut import Cut
from pydantic import Field
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_ENCODER, MICRO_TRAINING
from tests.helpers.spelled import some_texts, write_spelled
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import Config, HealthConfig, architecture, load_config
from w2vscale.corpora.shar import write_shards
from w2vscale.data.audio import AudioError
from w2vscale.data.inputs import AudioBatch, Utterance, audio_batch
from w2vscale.errors import UserError
from w2vscale.evaluation.validation import evaluate_checkpoint
from w2vscale.evaluation.wer import score_checkpoint
from w2vscale.files import read_metrics
from w2vscale.inference.pretrained import load
from w2vscale.inference.transcription import transcribe
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.models.layers import Linear
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder
from w2vscale.objectives import OBJECTIVES, Objective, StepContext
from w2vscale.objectives.base import Finding, ObjectiveSettings, Panel, Target
from w2vscale.training.dry_run import dry_run
from w2vscale.training.train import train

SHORTEST = 1600
"""Samples."""


class LoudnessSettings(ObjectiveSettings):
    """Settings of a regression."""

    name: Literal["loudness"] = architecture("loudness", "predict how loud an utterance is")
    width: int = architecture(8, "width of the hidden layer")
    decay: float = Field(0.5, description="share of the previous mean that is kept in each update")


class LoudnessInputs(NamedTuple):
    """Utterances and the logarithm of their power."""

    audio: AudioBatch
    power_B: Tensor
    counts: tuple[int, ...]

    @property
    def weights(self) -> tuple[int, ...]:
        """Utterances of each micro-batch."""
        return self.counts


class LoudnessSums(NamedTuple):
    """Sums over utterances."""

    total: Tensor
    utterances: Tensor


class LoudnessModel(nn.Module):
    """A regression from the mean of the context."""

    def __init__(self, objective: Loudness) -> None:
        super().__init__()
        self.compute_dtype = objective.compute_dtype
        self.encoder = Wav2Vec2Encoder(objective.model, objective.regularization)
        self.hidden = Linear(objective.model.dim, objective.settings.width)
        self.output = Linear(objective.settings.width, 1)
        self.register_buffer("mean_bias", torch.zeros(1))
        self.register_buffer("updates_seen", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: LoudnessInputs) -> LoudnessSums:
        audio = inputs.audio
        encoded = self.encoder(audio.waveforms_BS.to(self.compute_dtype), audio.lengths)
        predicted_B = self.output(torch.tanh(self.hidden(encoded.context_BTD.mean(dim=1)))).float().squeeze(1)
        # An empty micro-batch has one utterance of silence, which does not count.
        real_B = inputs.power_B.isfinite()
        error_B = torch.where(real_B, predicted_B - inputs.power_B.nan_to_num(), 0.0)
        total = error_B.square().sum()
        return LoudnessSums(total, torch.full_like(total.detach(), float(sum(inputs.counts))))


class Loudness(Objective):
    """Predict how loud an utterance is."""

    Settings = LoudnessSettings
    settings: LoudnessSettings
    shortest_frames = 5

    def build_model(self) -> LoudnessModel:
        return LoudnessModel(self)

    def read_target(self, cut: Cut, *, offset: int, samples: int) -> Target:
        assert 0 <= offset <= round(cut.duration * 16_000) - samples
        if cut.id.endswith("03"):
            raise AudioError("unlucky", "its number is 3")
        return Target(float(samples))

    def largest_target(self, samples: int) -> float:
        return float(samples)

    def make_inputs(
        self, utterances: Sequence[Utterance], *, rng: Callable[[int], np.random.Generator], width: int = 0
    ) -> LoudnessInputs:
        waveforms = [utterance.waveform for utterance in utterances] or [np.zeros(SHORTEST, np.float32)]
        assert all(utterance.target == utterance.waveform.size for utterance in utterances)
        powers = [math.log(float(np.square(waveform).mean())) for waveform in waveforms] if utterances else [math.nan]
        return LoudnessInputs(audio_batch(waveforms, self.model, width=width), torch.tensor(powers), (len(utterances),))

    def forward(self, module: nn.Module, inputs: LoudnessInputs, *, step: StepContext, training: bool) -> LoudnessSums:
        if training:
            step.seed_dropout()
        sums: LoudnessSums = module(inputs)
        return sums

    def after_step(self, module: Any, update: int) -> None:
        assert int(module.updates_seen) == update
        module.updates_seen += 1
        module.mean_bias.lerp_(module.output.bias, 1.0 - self.settings.decay)

    def metrics(self, sums: LoudnessSums) -> dict[str, float]:
        return {"loss": float(sums.total) / (float(sums.utterances) or math.nan)}

    def scheduled(self, update: int) -> dict[str, float]:
        return {"twice": 2.0 * update}

    def line(self, metrics: Mapping[str, float]) -> str:
        return f"squared error {metrics['loss']:.3f}"

    def table(self, metrics: Mapping[str, float]) -> dict[str, str]:
        return {"squared error": f"{metrics['loss']:.4f}"}

    def findings(self, metrics: Mapping[str, float], limits: HealthConfig) -> list[Finding]:
        return [Finding("solved", "it is loud")]

    def panels(self) -> tuple[Panel, Panel, Panel]:
        return tuple(Panel(key, key, {key: ""}) for key in ("loss", "lr", "twice"))  # type: ignore[return-value]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    OBJECTIVES["loudness"] = Loudness
    yield
    del OBJECTIVES["loudness"]


def config_of(corpus: SmallCorpus, *overrides: str) -> Config:
    data = [f"data.train={corpus.train}", f"data.validation={corpus.validation}", "trainer.validate_every=4"]
    settings = [*MICRO_ENCODER, *MICRO_TRAINING, "objective.name=loudness", "regularization.layerdrop=0", *data]
    return load_config("base", [*settings, "trainer.updates=8", "checkpoint.every=4", *overrides])


@pytest.fixture(scope="module")
def trained(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = tmp_path_factory.mktemp("loudness")
    assert train(config_of(small_corpus, "data.max_bad_fraction=0.2"), exp) == 0
    return exp


def test_it_trains_and_validates_through_the_loop(trained: Path) -> None:
    curve = read_metrics(trained / "metrics.jsonl", "train")
    assert [record["update"] for record in curve] == list(range(1, 9))
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert [record["twice"] for record in curve] == [2.0 * update for update in range(8)]
    assert all(record["grad_norm"] > 0 for record in curve)
    validation = read_metrics(trained / "metrics.jsonl", "validation")
    assert [record["update"] for record in validation] == [4, 8]
    bad = [json.loads(line) for line in (trained / "logs" / "bad_audio.jsonl").read_text().splitlines()]
    assert {(entry["utterance"], entry["kind"]) for entry in bad} == {
        ("train-03", "unlucky"),
        ("validation-03", "unlucky"),
    }


def test_its_settings_are_resolved_in_the_run_folder(trained: Path) -> None:
    assert load_config(trained / "config.yaml").objective.model_dump() == dict(LoudnessSettings())


def test_after_step_sees_the_model_after_each_step(trained: Path) -> None:
    tensors = whole(open_checkpoint(trained).model_tensors())
    assert int(tensors["updates_seen"]) == 8
    assert tensors["mean_bias"].any() and not torch.equal(tensors["mean_bias"], tensors["output.bias"])


def test_a_resumed_run_equals_an_uninterrupted_one(
    small_corpus: SmallCorpus, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(trained / "checkpoints" / "update_00000004", tmp_path / "checkpoints" / "update_00000004")
    assert train(config_of(small_corpus, "data.max_bad_fraction=0.2"), tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "squared error" in printed and "warning: it is loud" in printed
    one, other = (whole(open_checkpoint(exp).model_tensors()) for exp in (trained, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_evaluated_loaded_and_reported(small_corpus: SmallCorpus, trained: Path, tmp_path: Path) -> None:
    found = evaluate_checkpoint(trained, [small_corpus.validation])
    assert found is not None
    last = read_metrics(trained / "metrics.jsonl", "validation")[-1]
    assert found.metrics["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found.table == {"squared error": f"{last['loss']:.4f}"}
    assert set(load(trained).features(np.random.default_rng(0).standard_normal(16_000) * 0.1, 16_000)) == {0, 1, 2, 3}
    report = CliRunner().invoke(app, ["report", str(trained), "-o", str(tmp_path / "report.html")])
    assert report.exit_code == 0 and "training loss" in report.output


def test_its_encoder_is_exported_with_a_card(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained, tmp_path / "transformers", form="huggingface")
    config = json.loads((tmp_path / "transformers" / "config.json").read_text())
    assert config["architectures"] == ["Wav2Vec2Model"]
    card = (tmp_path / "transformers" / "README.md").read_text()
    assert "# wav2vec 2.0 encoder, pretrained with w2vscale" in card and "| objective | loudness |" in card
    last = read_metrics(trained / "metrics.jsonl", "validation")[-1]
    assert f"| validation squared error | {last['loss']:.4f} |" in card
    assert "model = Wav2Vec2Model.from_pretrained" in card
    assert not any(word in card for word in ("contrastive", "Baevski", "Wav2Vec2ForPreTraining", "Wav2Vec2ForCTC"))
    export_checkpoint(trained, tmp_path / "torchaudio", form="torchaudio")
    assert json.loads((tmp_path / "torchaudio" / "model.json").read_text())["aux_num_out"] is None


def test_it_does_not_transcribe(small_corpus: SmallCorpus, trained: Path) -> None:
    message = r"objective\.name=loudness: the model does not output text; fine-tune it"
    with pytest.raises(UserError, match=message):
        next(iter(transcribe(load(trained), [])))
    with pytest.raises(UserError, match=message):
        score_checkpoint(load(trained), [small_corpus.validation])


def test_it_is_probed_without_codes(trained: Path, tmp_path: Path) -> None:
    cuts = str(write_spelled(tmp_path / "spelled", some_texts(4)))
    command = ["probe", str(trained), "--train", cuts, "--test", cuts, "--updates", "2"]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0 and "codebook" not in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"probe.json", "layers.png"}


def test_a_dry_run_shows_its_parts(small_corpus: SmallCorpus) -> None:
    found = dry_run(config_of(small_corpus))
    assert found is not None
    assert {"hidden", "output", "feature_encoder", "transformer"} <= found.parameters.keys()
    assert found.shapes["power_B"] == (found.weight,)


def test_a_stream_has_a_largest_micro_batch_with_targets(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    write_shards(small_corpus.train, tmp_path, shard_size=10)
    found = dry_run(config_of(small_corpus, "data.mode=stream", f"data.train={tmp_path}"))
    assert found is not None and found.shapes["power_B"] == (found.weight,)


def test_micro_batches_may_share_a_forward(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    losses = []
    for joined in (1, 4):
        dropouts = [f"regularization.{name}=0" for name in ("dropout", "attention_dropout", "input_dropout")]
        config = config_of(
            small_corpus, *dropouts, "data.max_bad_fraction=0.2", f"batch.concat={joined}", "trainer.updates=4"
        )
        train(config, tmp_path / str(joined))
        losses.append([record["loss"] for record in read_metrics(tmp_path / str(joined) / "metrics.jsonl", "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_its_architecture_cannot_change_in_a_run(small_corpus: SmallCorpus, trained: Path) -> None:
    with pytest.raises(UserError, match=r"objective\.width=4: .* was made with 8"):
        train(config_of(small_corpus, "objective.width=4"), trained)


def test_its_encoder_starts_a_run_of_another_objective(
    small_corpus: SmallCorpus, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(
        "base",
        [
            *MICRO_ENCODER, *MICRO_TRAINING, "objective.codevector_dim=16", f"data.train={small_corpus.train}",
            f"trainer.init_from={trained}", "trainer.updates=4", "optim.lr=1e-12",
        ],
    )  # fmt: skip
    assert train(config, tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "newly initialised: quantizer.projection.weight is missing" in printed
    theirs, ours = (whole(open_checkpoint(exp).model_tensors()) for exp in (trained, tmp_path))
    name = "encoder.transformer.blocks.1.attention.qkv.weight"
    assert torch.allclose(theirs[name], ours[name], atol=1e-6)
