"""BEST-RQ: its targets follow the paper, its loss counts masked frames alone, and it runs like the others."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from typer.testing import CliRunner

from tests.helpers.audio import SmallCorpus, noise, tone
from tests.helpers.batches import inputs_of
from tests.helpers.engines import filled_model
from tests.helpers.micro import MICRO_ENCODER, MICRO_TRAINING
from tests.helpers.processes import Command
from tests.helpers.spelled import some_texts, write_spelled
from tests.helpers.tasks import train_micro
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import Config, load_config
from w2vscale.data.inputs import join
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import load
from w2vscale.objectives import build_objective
from w2vscale.objectives.best_rq import LogMel, RandomQuantizer, mel_filters

OBJECTIVE = ("objective.name=best_rq", "objective.codebooks=3", "objective.codebook_entries=12")
DEADLINE = 120.0
"""Seconds."""


def config_of(*overrides: str) -> Config:
    return load_config("base", [*MICRO_ENCODER, *MICRO_TRAINING, *OBJECTIVE, *overrides])


@pytest.fixture(scope="module")
def model() -> Any:
    return filled_model(config_of()).eval()


def one_mel_frame(samples: NDArray[np.float64], rate: int, points: int, bins: int) -> NDArray[np.float64]:
    """The definition, one bin at a time."""
    size = samples.size
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))
    power = np.abs(np.fft.rfft(samples * window, points)) ** 2
    hertz = np.arange(points // 2 + 1) * rate / points
    edges = [
        700 * (math.exp(mel / 1127.01048) - 1) for mel in np.linspace(0, 1127.01048 * math.log1p(rate / 1400), bins + 2)
    ]
    found = np.empty(bins)
    for number in range(bins):
        left, centre, right = edges[number : number + 3]
        weights = np.interp(hertz, [left, centre, right], [0, 1, 0], left=0, right=0)
        found[number] = math.log(max(float(power @ weights), 1e-10))
    return found


def test_log_mel_features_follow_their_definition() -> None:
    config = load_config("base", ["model.sampling_rate=16000"]).model
    audio = noise(0.1, seed=3) + tone(0.1, 1000.0)
    found = LogMel(config, 40)(torch.from_numpy(audio)[None], 4)[0]
    assert found.shape == (4, 80)
    padded = np.concatenate([audio.astype(np.float64), np.zeros(1000)])
    for frame in range(4):
        for part in range(2):
            start = (2 * frame + part) * 160
            expected = one_mel_frame(padded[start : start + 400], 16_000, 512, 40)
            np.testing.assert_allclose(found[frame, 40 * part : 40 * (part + 1)], expected, rtol=1e-3, atol=1e-3)


def test_a_tone_is_loudest_in_the_filter_around_it() -> None:
    filters = mel_filters(257, 80, 16_000)
    assert filters.shape == (257, 80)
    loudest = LogMel(load_config("base").model, 80)(torch.from_numpy(tone(0.5, 1000.0))[None], 10)[0, 5, :80].argmax()
    assert filters[1000 * 512 // 16_000].argmax() == loudest


def test_the_nearest_entry_is_that_of_the_smallest_distance() -> None:
    settings: Any = build_objective(config_of()).settings
    quantizer = RandomQuantizer(6, settings)
    assert torch.allclose(quantizer.codebook_GVD.norm(dim=2), torch.ones(3, 12))
    bound = math.sqrt(6 / (6 + settings.codebook_dim))
    assert quantizer.projection_GJD.abs().max() <= bound and quantizer.projection_GJD.abs().max() > 0.8 * bound
    features = torch.randn(50, 6)
    for group in range(3):
        projected = F.normalize(features @ quantizer.projection_GJD[group], dim=1)
        nearest = torch.cdist(projected, quantizer.codebook_GVD[group]).argmin(dim=1)
        assert torch.equal(quantizer(features)[:, group], nearest)


def test_features_are_normalised_over_each_utterance_whatever_it_is_batched_with(model: Any) -> None:
    objective = build_objective(config_of())
    short, long = noise(1.0, seed=1), 0.01 * noise(2.3, seed=2)
    alone, together = (inputs_of(objective, each).audio for each in ([short], [long, short]))
    features = model.features(alone)[0]
    assert features.mean(dim=0).abs().max() < 1e-4
    assert torch.allclose(features.var(dim=0, correction=0), torch.ones(160), atol=1e-2)
    batched = model.features(together)
    assert torch.allclose(batched[1, : len(features)], features, atol=1e-5)
    assert not batched[1, len(features) :].any()
    louder = inputs_of(objective, [10 * short]).audio
    assert torch.allclose(model.features(louder), features, atol=1e-3)


def test_the_loss_is_the_cross_entropy_of_masked_frames(model: Any) -> None:
    inputs = inputs_of(build_objective(config_of()), [noise(1.0, seed=1), noise(2.3, seed=2)])
    seen: dict[str, Any] = {}
    handle = model.encoder.register_forward_hook(lambda module, args, output: seen.update(encoded=output))
    with torch.no_grad():
        sums = model(inputs)
    handle.remove()
    total = correct = 0.0
    for utterance, frame in inputs.audio.mask_BT.nonzero().tolist():
        logits = model.head(seen["encoded"].context_BTD[utterance, frame]).detach().view(3, 12)
        codes = model.quantizer(model.features(inputs.audio)[utterance, frame][None])[0]
        for group in range(3):
            total -= float(logits[group].log_softmax(dim=0)[codes[group]]) / 3
            correct += float(logits[group].argmax() == codes[group]) / 3
    assert float(sums.total) == pytest.approx(total, rel=1e-5)
    assert float(sums.correct) == pytest.approx(correct, abs=1e-4)
    assert float(sums.masked) == sum(inputs.weights) == int(inputs.audio.mask_BT.sum())
    assert torch.equal(sums.code_counts_GV.sum(dim=1), torch.full((3,), float(sums.masked)))


def test_joined_micro_batches_add_up(model: Any) -> None:
    objective = build_objective(config_of())
    parts = [inputs_of(objective, [noise(seconds, seed=7)], number=k) for k, seconds in enumerate((1.0, 2.3))]
    parts.append(inputs_of(objective, []))
    joined = join(parts)
    assert joined.weights == tuple(weight for part in parts for weight in part.weights)
    with torch.no_grad():
        separate = [model(part) for part in parts]
        for name, together in model(joined)._asdict().items():
            assert torch.allclose(together, sum(getattr(one, name) for one in separate), rtol=1e-5), name


def test_metrics_compare_with_always_predicting_the_most_frequent_code() -> None:
    objective: Any = build_objective(config_of("objective.codebooks=1", "objective.codebook_entries=4"))
    inputs = inputs_of(objective, [noise(1.0, seed=1)])
    with torch.no_grad():
        sums: Any = filled_model(config_of("objective.codebooks=1", "objective.codebook_entries=4")).eval()(inputs)
    masked = float(sums.masked)
    sums = sums._replace(code_counts_GV=torch.tensor([[0.75, 0.25, 0.0, 0.0]]) * masked, correct=masked / 2)
    metrics = objective.metrics(sums)
    assert metrics["most_frequent"] == pytest.approx(0.75)
    assert metrics["accuracy"] == pytest.approx(0.5)
    assert metrics["code_perplexity_0"] == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-4
    )
    assert metrics["loss_bits"] == pytest.approx(metrics["loss"] / math.log(2))
    assert all(math.isnan(objective.metrics(sums._replace(masked=0.0))[key]) for key in ("loss", "accuracy"))


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while not (path.is_file() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline, f"{path} never had {count} lines"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def trained(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = tmp_path_factory.mktemp("best-rq")
    settings = (f"data.validation={small_corpus.validation}", "trainer.validate_every=6", "checkpoint.every=6")
    train_micro(str(small_corpus.train), str(exp), (*OBJECTIVE, *settings))
    return exp


def test_random_targets_are_frozen_and_come_from_the_seed(trained: Path) -> None:
    first, last = (
        whole(open_checkpoint(trained / "checkpoints" / f"update_{update:08d}").model_tensors()) for update in (6, 12)
    )
    drawn = filled_model(config_of()).state_dict()
    other = filled_model(config_of("trainer.seed=2")).state_dict()
    for name in ("quantizer.projection_GJD", "quantizer.codebook_GVD"):
        assert torch.equal(first[name], last[name]) and torch.equal(last[name], drawn[name])
        assert not torch.equal(drawn[name], other[name])
    assert not torch.equal(first["head.weight"], last["head.weight"])
    assert not [name for name in open_checkpoint(trained).specs if name.startswith("optim.quantizer")]


@pytest.mark.long
def test_a_killed_run_continues_bit_for_bit(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    settings = [*MICRO_ENCODER, *MICRO_TRAINING, *OBJECTIVE, f"data.train={small_corpus.train}"]
    found = []
    for name in ("uninterrupted", "killed"):
        exp = tmp_path / name
        command = ("train", "base", *settings, "checkpoint.every=3", "--exp", str(exp))
        if name == "killed":
            process = Command(tmp_path / "killed.log", *command)
            wait_for_lines(exp / "metrics.jsonl", 7)
            process.kill()
            process.finish(code=-signal.SIGKILL, timeout=DEADLINE)
            assert (exp / "metrics.jsonl").read_text().count("\n") < 12, "it ended before it could be killed"
        Command(tmp_path / f"{name}.log", *command).finish(code=0, timeout=DEADLINE)
        checkpoint = open_checkpoint(exp)
        found.append({name: checkpoint.tensor(name) for name in checkpoint.specs})
    assert found[0].keys() == found[1].keys() and "model.quantizer.codebook_GVD" in found[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_it_is_evaluated_and_reported(small_corpus: SmallCorpus, trained: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    for command in (
        ["evaluate", str(trained), "--cuts", str(small_corpus.validation), "-o", str(results)],
        ["report", str(trained), "-o", str(tmp_path / "report.html")],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["split"] == "validation"][-1]
    found = json.loads(results.read_text())
    assert found["accuracy"] == pytest.approx(last["accuracy"], rel=1e-6)


def test_its_encoder_becomes_a_wav2vec2_model_of_transformers(trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    done = CliRunner().invoke(app, ["export", str(trained), str(tmp_path / "hf")])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "BEST-RQ" in card and "Wav2Vec2ForPreTraining" not in card and "| validation accuracy |" in card
    theirs, report = transformers.Wav2Vec2Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    audio = noise(1.5, seed=4)
    with torch.no_grad():
        hidden = theirs.eval()(torch.from_numpy(audio)[None], output_hidden_states=True).hidden_states
    for layer, mine in load(trained).features(audio, 16_000).items():
        assert torch.allclose(mine, hidden[layer][0], atol=1e-5)


def test_its_encoder_is_fine_tuned(trained: Path, tmp_path: Path) -> None:
    spelled = write_spelled(tmp_path / "spelled", some_texts(12))
    command = ["finetune", "ctc_1h", f"trainer.init_from={trained}", f"data.train={spelled}", *MICRO_TRAINING]
    done = CliRunner().invoke(app, [*command, "trainer.updates=2", "--exp", str(tmp_path / "exp")])
    assert done.exit_code == 0, done.output
    assert "newly initialised: head.weight" in done.output
    one, other = (whole(open_checkpoint(exp).model_tensors()) for exp in (trained, tmp_path / "exp"))
    frozen = [name for name in one if name.startswith("encoder.feature_encoder") and name in other]
    assert frozen and all(torch.equal(one[name], other[name]) for name in frozen)


def test_a_frame_that_is_no_whole_number_of_mel_frames_is_refused() -> None:
    config = config_of("model.conv_layers=[[16,10,5],[16,3,3]]")
    with pytest.raises(UserError, match=r"model\.conv_layers: a frame of 15 samples"):
        build_objective(config)


def test_a_probe_needs_no_codes_of_the_model(trained: Path, tmp_path: Path) -> None:
    spelled = write_spelled(tmp_path / "spelled", some_texts(12))
    command = ["probe", str(trained), "--train", str(spelled), "--test", str(spelled), "--updates", "2"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "probe")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["codebooks"] == []
