"""Probes find what the features encode, and how much of it is chance."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.helpers.micro import MICRO_RUN
from tests.helpers.spelled import SPELLED, SPELLING, some_texts, write_spelled
from w2vscale.analysis.codes import Cooccurrence, cooccurrence
from w2vscale.analysis.probing import _Probes, _whiten
from w2vscale.analysis.representations import (
    Encoded,
    hidden_states,
    labelled_utterances,
    log_mel,
    with_random_weights,
)
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.data.transcripts import Transcripts
from w2vscale.data.vocabulary import read_vocabulary
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import load
from w2vscale.objectives.base import initial_state
from w2vscale.training.train import train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Manifests to train and test on, of two speakers; one test utterance has no transcript."""
    folder = tmp_path_factory.mktemp("spelled")
    texts = some_texts(40)
    return (
        write_spelled(folder / "train", texts[:30], speakers=2),
        write_spelled(folder / "test", [*texts[30:], ""], speakers=2),
    )


@pytest.fixture(scope="module")
def pretrained(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = tmp_path_factory.mktemp("pretrained")
    settings = [
        *MICRO_RUN,
        *SPELLED,
        f"data.train={corpus[0]}",
        "trainer.updates=4",
    ]
    assert train(load_config("base", settings), exp) == 0
    return exp


def probed(pretrained: Path, corpus: tuple[Path, Path], output: Path, *options: str) -> dict[str, Any]:
    command = ["probe", str(pretrained), "--train", str(corpus[0]), "--test", str(corpus[1]), "-o", str(output)]
    result = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (
        "codebook 1: normalised mutual information" in result.output
        and "skipped: u10: has no transcript" in result.output
    )
    found: dict[str, Any] = json.loads((output / "probe.json").read_text())
    return found


def test_tones_are_spelled_from_frozen_features(pretrained: Path, corpus: tuple[Path, Path], tmp_path: Path) -> None:
    before = whole(open_checkpoint(pretrained).model_tensors())
    found = probed(pretrained, corpus, tmp_path, "--updates", "30")
    after = whole(open_checkpoint(pretrained).model_tensors())
    assert all((before[name] == after[name]).all() for name in before)
    rates = found["label_error_rate"]
    assert isinstance(rates, dict) and list(rates) == ["0", "1", "2", "3"]
    assert min(rates.values()) == rates[str(found["best_layer"])] < 0.2
    losses = found["ctc_loss"]
    assert list(losses) == ["0", "1", "2", "3"] and losses[str(found["best_layer"])] < 1.0
    assert (found["train_utterances"], found["test_utterances"], found["left_out"]) == (30, 10, 1)
    check_baselines(found)
    codebooks = found["codebooks"]
    assert isinstance(codebooks, list) and len(codebooks) == 2
    for codebook in codebooks:
        assert codebook["letters"] > 3 * codebook["letters_by_chance"]
        assert codebook["letters"] > codebook["speakers"]
    for picture in ("layers.png", "codes_letters.png", "codes_speakers.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def check_baselines(found: dict[str, Any]) -> None:
    """Rates and intervals must follow from the errors of the utterances, which are those of all probes."""
    errors = dict.fromkeys(found["utterances"][0]["errors"], 0)
    assert list(errors) == ["0", "1", "2", "3", "log_mel", "random_0", "random_1", "random_2", "random_3"]
    for utterance in found["utterances"]:
        for key in errors:
            errors[key] += utterance["errors"][key]
    labels = sum(utterance["labels"] for utterance in found["utterances"])
    random = found["random"]["label_error_rate"]
    rates = found["label_error_rate"] | {f"random_{layer}": rate for layer, rate in random.items()}
    assert rates | {"log_mel": found["log_mel"]["label_error_rate"]} == {
        key: count / labels for key, count in errors.items()
    }
    assert random[str(found["random"]["best_layer"])] == min(random.values())
    best = rates[str(found["best_layer"])]
    for name, baseline in (("log_mel", found["log_mel"]["label_error_rate"]), ("random", min(random.values()))):
        # JSON has no infinity: a bound is null if the baseline makes no errors in many samples.
        reduction, low, high = (-math.inf if value is None else value for value in found["reduction"][name])
        assert low <= reduction <= high and reduction == pytest.approx(1.0 - best / baseline)


def test_the_loss_of_a_probe_without_weights_is_that_of_uniform_symbols() -> None:
    frames, symbols = 6, 4
    one = Encoded("u1", "s1", [2], torch.zeros(1, frames, 3), np.zeros((frames, 0), dtype=np.int64))
    (found,) = _Probes(torch.zeros(1, 3, symbols), torch.zeros(1, symbols)).tested([one])
    paths = frames * (frames + 1) / 2  # places of the first and the last frame of the label
    assert found.loss == pytest.approx(frames * math.log(symbols) - math.log(paths))


def test_features_are_whitened_as_the_training_set_says() -> None:
    """Correlated dimensions of all sizes become alike; one that is constant in training becomes zero."""
    generator = torch.Generator().manual_seed(0)
    mixing_DD = torch.randn(6, 6, generator=generator) * torch.tensor([[1e3], [1.0], [1.0], [1.0], [1e-3], [0.0]])
    features = torch.randn(20, 1, 50, 6, generator=generator) @ mixing_DD.T + 7.0
    features[..., 5] = 3.0
    sets = [
        [
            Encoded(str(index), "s", [1], one.clone(), np.zeros((50, 0), dtype=np.int64))
            for index, one in enumerate(half)
        ]
        for half in (features[:15], features[15:])
    ]
    sets[1][0].hidden_LTD[..., 5] += 0.01
    _whiten(sets)
    whitened_TD = torch.cat([one.hidden_LTD[0] for one in sets[0]])
    assert whitened_TD.mean(dim=0).abs().max() < 1e-4
    values = torch.linalg.eigvalsh(torch.cov(whitened_TD.T))
    assert values[-5:].min() > 0.9 and values.max() < 1.1
    assert max(float(one.hidden_LTD.abs().max()) for one in sets[1]) < 20.0


def test_random_weights_are_those_that_the_run_began_with(pretrained: Path) -> None:
    trained = load(pretrained)
    untrained = with_random_weights(trained)
    begun = dict(initial_state(trained.objective, trained.config.trainer.seed))
    for name, value in untrained.model.state_dict().items():
        assert torch.equal(value, begun[name]), name
    assert not torch.equal(trained.model.encoder.mask_embedding, untrained.model.encoder.mask_embedding)


def test_log_mel_features_are_those_of_the_objective_that_predicts_them(
    pretrained: Path, corpus: tuple[Path, Path]
) -> None:
    model = load(pretrained)
    utterances = labelled_utterances([corpus[1]], Transcripts(read_vocabulary(Path("letters"))), [])
    (first, *_), (states, *_) = log_mel(model, utterances[:1]), hidden_states(model, utterances[:1], [0], [])
    assert first.hidden_LTD.shape == (1, states.frames, 160) and first.labels == states.labels
    assert first.hidden_LTD.mean(dim=1).abs().max() < 1e-5
    assert torch.allclose(first.hidden_LTD.std(dim=1), torch.ones(160), atol=0.01)


def test_probes_repeat_and_do_not_depend_on_the_other_layers(
    pretrained: Path, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    both = probed(pretrained, corpus, tmp_path / "both", "--updates", "20", "--layer", "1", "--layer", "3")
    assert both == probed(pretrained, corpus, tmp_path / "again", "--updates", "20", "--layer", "1", "--layer", "3")
    alone = probed(pretrained, corpus, tmp_path / "alone", "--updates", "20", "--layer", "1", "--no-baselines")
    assert "log_mel" not in alone and "random" not in alone
    assert isinstance(alone["label_error_rate"], dict) and isinstance(both["label_error_rate"], dict)
    assert alone["label_error_rate"]["1"] == pytest.approx(both["label_error_rate"]["1"], abs=0.02)


def test_unusable_input_is_refused(pretrained: Path, corpus: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(checkpoint: Path, train: Path, *options: str) -> str:
        command = ["probe", str(checkpoint), "--train", str(train), "--test", str(corpus[1]), "-o", str(tmp_path)]
        result = CliRunner().invoke(app, [*command, *options])
        assert isinstance(result.exception, UserError), result.output
        return str(result.exception)

    silent = write_spelled(tmp_path / "silent", ["", ""])
    assert refused(pretrained, silent) == f"{silent}: no utterance has both a transcript and usable audio"
    assert "layer 9: the model has layers 0 to 3" in refused(pretrained, corpus[0], "--layer", "9")
    assert "no_such.txt" in refused(pretrained, corpus[0], "--vocabulary", "no_such.txt")


def test_a_model_without_codes_gets_error_rates_alone(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    tuned, output = tmp_path / "tuned", tmp_path / "out"
    train(load_config("base", [*SPELLING, f"data.train={corpus[0]}", "trainer.updates=4"]), tuned)
    command = ["probe", str(tuned), "--train", str(corpus[0]), "--test", str(corpus[1]), "-o", str(output)]
    result = CliRunner().invoke(app, [*command, "--updates", "4"], catch_exceptions=False)
    assert result.exit_code == 0 and "label error rate" in result.output and "codebook" not in result.output
    found = json.loads((output / "probe.json").read_text())
    assert found["codebooks"] == [] and found["frames"] > 40 * 30
    assert {path.name for path in output.iterdir()} == {"probe.json", "layers.png"}


def test_information_is_relative_to_the_entropy_of_the_classes() -> None:
    classes = np.array(["a", "a", "b", "b"])
    found = cooccurrence(classes, np.array([2, 2, 0, 0]), entries=3)
    assert found.classes == ["a", "b"] and found.frames_CV.tolist() == [[0, 0, 2], [2, 0, 0]]
    assert found.information == pytest.approx(1.0)
    assert cooccurrence(classes, np.array([0, 1, 0, 1]), entries=3).information == pytest.approx(0.0)
    # Half of the frames determine the class, the others carry no information.
    half = Cooccurrence(["a", "b"], np.array([[2, 0, 2], [0, 2, 2]]))
    assert half.information == pytest.approx(0.5)
    assert cooccurrence(np.array(["a", "a"]), np.array([0, 1]), entries=2).information == 0.0
