"""The metadata of a model card is what huggingface_hub reads: licence, languages and error rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.helpers.exported import random_model, save_model
from tests.helpers.micro import SMALL
from w2vscale.checkpoint.format import TrainState
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.interop.model_card import CardDetails

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of fine-tuning, with one checkpoint."""
    encoder = [setting for setting in SMALL if setting.startswith("model.")]
    config = load_config("base", [*encoder, "model.layers=1", "objective.name=ctc", "objective.vocabulary=letters"])
    save_model(tmp_path / "base_1h", config, random_model(config, seed=3).state_dict(), TrainState(update=7))
    return tmp_path / "base_1h"


def evaluation(path: Path, **changes: Any) -> Path:
    """A file as `w2vscale evaluate --wer --output` writes it."""
    counts = {"reference": 8, "substitutions": 1, "deletions": 0, "insertions": 0}
    document = {
        "checkpoint": "exp/base_1h", "update": 7, "cuts": ["test-clean"], "decoding": "greedy", "wer": 0.125,
        "cer": 0.03125, "word_interval": [0.0, 0.25], "character_interval": [0.0, 0.1],
        "utterances": [{"utterance": "u", "words": counts, "characters": {**counts, "reference": 32}}],
    }  # fmt: skip
    path.write_text(json.dumps(document | changes))
    return path


def exported(run: Path, *options: str) -> Path:
    folder = run.parent / "export"
    result = CliRunner().invoke(app, ["export", str(run), str(folder), *options])
    if result.exception is not None:
        raise result.exception
    return folder


def test_everything_is_read_back(run: Path) -> None:
    """By the library of the Hub, which validates it."""
    evaluation(run / "wer_test.json")
    evaluation(run / "wer_test_lm.json", decoding="beam 50, 4|gram.arpa", wer=0.1, checkpoint="/x/base_1h/checkpoints")
    evaluation(run / "wer_other.json", cuts=["dev", "other"], checkpoint="checkpoints/update_00000007")
    # Of others, or something else.
    evaluation(run / "wer_earlier.json", update=6)
    evaluation(run / "wer_ema.json", weights="ema")
    evaluation(run / "wer_average.json", checkpoint="exp/average")
    evaluation(run / "wer_broken.json", wer="low")
    (run / "settings.json").write_text("{")
    folder = exported(run, "--license", "apache-2.0", "--language", "de", "--language", "en")

    metadata = hub.metadata_load(folder / "README.md")
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", ["de", "en"])
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "automatic-speech-recognition")
    card = hub.ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.model_name == "base_1h"
    found = [(one.dataset_name, one.metric_type, one.metric_value, one.metric_name) for one in card.data.eval_results]
    assert found == [
        ("dev, other", "wer", 12.5, "WER (%), greedy"),
        ("dev, other", "cer", 3.12, "CER (%), greedy"),
        ("test-clean", "wer", 12.5, "WER (%), greedy"),
        ("test-clean", "cer", 3.12, "CER (%), greedy"),
        ("test-clean", "wer", 10.0, "WER (%), beam 50, 4|gram.arpa"),
        ("test-clean", "cer", 3.12, "CER (%), beam 50, 4|gram.arpa"),
    ]
    assert {one.task_type for one in card.data.eval_results} == {"automatic-speech-recognition"}
    name, results = hub.repocard_data.model_index_to_eval_results(metadata["model-index"])
    assert name == "base_1h" and results == card.data.eval_results
    assert "| test-clean | greedy | 1 | 12.50% (0.00% to 25.00%) | 3.12% (0.00% to 10.00%) |\n" in card.text
    assert "| test-clean | beam 50, 4&#124;gram.arpa | 1 | 10.00% " in card.text


def test_a_card_without_details(run: Path) -> None:
    folder = exported(run)
    metadata = hub.metadata_load(folder / "README.md")
    assert not {"license", "language", "model-index"} & metadata.keys()
    assert "Error rates" not in (folder / "README.md").read_text()


def test_files_of_results(run: Path, tmp_path: Path) -> None:
    evaluation(run / "wer_test.json")
    chosen = evaluation(tmp_path / "chosen.json", cuts=["mine"], update=5, weights="ema")
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "export"), "--results", str(chosen)])
    assert "chosen.json: is of update 5, and the exported checkpoint of update 7" in result.output
    assert "chosen.json: is of --weights ema, and --weights raw are exported" in " ".join(result.output.split())
    card = hub.ModelCard.load(tmp_path / "export" / "README.md")
    assert {one.dataset_name for one in card.data.eval_results} == {"mine"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--license", "Apache-2.0"], "--license Apache-2.0: not an identifier of a licence on the Hugging Face Hub"),
        (["--language", "German"], "--language German: not a code of ISO 639, such as de or deu"),
        (["--license", "mit", "--format", "fairseq2"], "has no model card for --license and --language; choose hugg"),
        (["--results", "none.json", "--format", "torchaudio"], "--results: --format torchaudio has no model card"),
        (["--results", "none.json"], "none.json: cannot be read: No such file"),
        (["--results", "loss.json"], "--results loss.json: has no word error rate; evaluate the model with --wer"),
    ],
)
def test_details_that_cannot_be_used(
    run: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(run.parent)
    Path("loss.json").write_text(json.dumps({"update": 7, "utterances": 3.0, "table": {"loss": "1"}}))
    with pytest.raises(UserError) as caught:
        exported(run, *options)
    assert message in str(caught.value)
    assert not (run.parent / "export").exists()


def test_a_language_may_look_like_a_boolean(run: Path) -> None:
    """Norwegian, in YAML 1.1."""
    export_checkpoint(run, run / "export", form="huggingface", details=CardDetails(languages=("no",)))
    assert hub.metadata_load(run / "export" / "README.md")["language"] == ["no"]
