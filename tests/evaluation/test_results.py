"""Tables of results, and the relative reduction of error rates against a baseline."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from w2vscale.cli.app import app
from w2vscale.errors import UserError
from w2vscale.evaluation.bootstrap import relative_reduction
from w2vscale.evaluation.results import read_results, results_page
from w2vscale.evaluation.wer import score, summarise


def write_score(folder: Path, hypotheses: list[str], *, decoding: str = "greedy") -> Path:
    found = summarise([score(f"u{n}", "one two three four", hypothesis) for n, hypothesis in enumerate(hypotheses)], [])
    rates = {"wer": found.words.rate, "cer": found.characters.rate}
    document = {"checkpoint": str(folder), "cuts": ["dev"], "decoding": decoding, **rates, **asdict(found)}
    folder.mkdir(exist_ok=True)
    path = folder / f"wer_{decoding}.json"
    path.write_text(json.dumps(document))
    return path


def test_a_reduction_is_relative_and_paired() -> None:
    baseline = {f"u{n}": (4 + n % 3, 10) for n in range(60)}
    # Every utterance has half the errors of the baseline, and so has every bootstrap sample.
    assert relative_reduction({name: (errors / 2, 10) for name, (errors, _) in baseline.items()}, baseline) == (
        pytest.approx((0.5, 0.5, 0.5))
    )
    generator = np.random.default_rng(0)
    ours = {name: (int(generator.integers(0, 6)), 10) for name in baseline}
    value, low, high = relative_reduction(ours, baseline)
    total = sum(errors for errors, _ in ours.values()) / sum(errors for errors, _ in baseline.values())
    assert value == pytest.approx(1 - total)
    assert low < value < high and 0.05 < high - low < 0.5
    with pytest.raises(UserError, match="evaluated on different utterances"):
        relative_reduction(ours, {"other": (1, 10)})


def test_a_baseline_that_hardly_errs_leaves_no_lower_bound() -> None:
    baseline = {f"u{n}": (int(n == 0), 10) for n in range(30)}
    value, low, high = relative_reduction({f"u{n}": (int(n == 1), 10) for n in range(30)}, baseline)
    assert (value, low) == (0.0, -np.inf) and high == 1.0
    # Equal errors are equal in every bootstrap sample.
    assert relative_reduction(baseline, baseline) == (0.0, 0.0, 0.0)


def test_a_missing_bound_is_printed_as_such(tmp_path: Path) -> None:
    right, wrong = "one two three four", "one two three"
    paths = [write_score(tmp_path / "a", [right, wrong] + [right] * 20)]
    paths.append(write_score(tmp_path / "a_scratch", [wrong, right] + [right] * 20))
    page = results_page(read_results(paths), "Trial")
    assert "WER lower by 0.0% (95 %: no bound to 100.0%)" in page


def test_incomplete_metrics_are_refused(tmp_path: Path) -> None:
    path = write_score(tmp_path / "a", ["one"])
    document = json.loads(path.read_text())
    for missing in ("cer", "cuts", "word_interval"):
        path.write_text(json.dumps({key: value for key, value in document.items() if key != missing}))
        with pytest.raises(UserError, match="not written by w2vscale evaluate"):
            read_results([path])


def write_metrics(folder: Path, table: dict[str, str]) -> Path:
    """The file of an evaluation with validation metrics."""
    folder.mkdir()
    path = folder / "evaluation.json"
    path.write_text(json.dumps({"loss": 1.5, "update": 1200, "utterances": 58.0, "table": table}))
    return path


def test_a_page_of_results(tmp_path: Path) -> None:
    pretraining = write_metrics(tmp_path / "tiny", {"contrastive loss": "5.500 bits", "accuracy": "0.250"})
    other = write_metrics(tmp_path / "other", {"loss": "1.2 nats", "accuracy": "0.125"})
    ours = write_score(tmp_path / "tiny_1h", ["one two three four", "one two three"])
    baseline = write_score(tmp_path / "tiny_1h_scratch", ["one two", "one two"])
    beam = write_score(tmp_path / "tiny_1h", ["one two three four"] * 2, decoding="beam")
    command = ["results", *map(str, (pretraining, other, ours, baseline, beam)), "-o", str(tmp_path / "RESULTS.md")]
    result = CliRunner().invoke(app, [*command, "--title", "Trial"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.startswith("# Trial\n")
    assert "| run | update | utterances | contrastive loss | accuracy | loss |" in page
    assert "| tiny | 1,200 | 58 | 5.500 bits | 0.250 |  |" in page
    assert "| other | 1,200 | 58 |  | 0.125 | 1.2 nats |" in page
    assert "| tiny_1h | dev | greedy | 12.5% (0.0% to 25.0%) |" in page
    assert "| tiny_1h_scratch | dev | greedy | 50.0% (50.0% to 50.0%) |" in page
    assert "`tiny_1h` against `tiny_1h_scratch` on dev, greedy: WER lower by 75.0% (95 %: 50.0% to 100.0%)" in page
    assert page.count("against") == 1
    write_score(tmp_path / "tiny_1h", ["one", "one two"])
    output = CliRunner().invoke(app, ["results", str(ours), str(baseline), "-o", str(tmp_path / "again.md")]).output
    assert "WER higher by 25.0% (95 %: 0.0% to 50.0%)" in output


def test_a_run_is_compared_with_all_its_baselines(tmp_path: Path) -> None:
    texts = {
        "a": ["one two three four"] * 2,
        "a_scratch": ["one", "one two"],
        "a_imported": ["one two", "one two three"],
    }
    page = results_page(read_results([write_score(tmp_path / name, said) for name, said in texts.items()]), "Trial")
    assert page.count("`a` against `a_scratch`") == 1 and page.count("`a` against `a_imported`") == 1
    assert page.count("against") == 2


def test_other_baselines_can_be_named(tmp_path: Path) -> None:
    texts = {"a": ["one two three four"] * 2, "b": ["one two three"] * 2, "scratch": ["one", "one two"]}
    paths = [str(write_score(tmp_path / name, said)) for name, said in texts.items()]
    command = ["results", *paths, "-o", str(tmp_path / "RESULTS.md"), "--baseline"]
    page = CliRunner().invoke(app, [*command, "scratch"]).output
    assert "`a` against `scratch`" in page and "`b` against `scratch`" in page and page.count("against") == 2
    refused = CliRunner().invoke(app, [*command, "scrach"]).exception
    assert str(refused) == "--baseline scrach: none of the files has error rates of a run of this name"


def measured(rates: dict[str, float]) -> dict[str, Any]:
    """What probe.json has of the layers of a model."""
    losses = {layer: 4 * rate for layer, rate in rates.items()}
    return {
        "label_error_rate": rates,
        "ctc_loss": losses,
        "best_layer": int(min(rates, key=lambda layer: rates[layer])),
    }


def write_probe(folder: Path, errors: dict[str, int], *, utterances: int = 30) -> Path:
    """The file of a probe of the model `folder` in which every utterance of 10 labels has the same errors."""
    rates = {key: count / 10 for key, count in errors.items()}
    layers, random = (
        {key.removeprefix("random_"): rate for key, rate in rates.items() if key.startswith("random_") == wanted}
        for wanted in (False, True)
    )
    mel = layers.pop("log_mel")
    document = {
        "checkpoint": str(folder),
        **measured(layers),
        "log_mel": {"label_error_rate": mel, "ctc_loss": 3.0},
        "random": measured(random),
        "utterances": [{"utterance": f"u{n}", "labels": 10, "errors": errors} for n in range(utterances)],
    }
    (folder / "probe").mkdir(parents=True)
    path = folder / "probe" / "probe.json"
    path.write_text(json.dumps(document))
    return path


def test_probes_are_compared_with_their_baselines_and_each_other(tmp_path: Path) -> None:
    one = write_probe(tmp_path / "one", {"0": 7, "1": 5, "log_mel": 8, "random_0": 10, "random_1": 10})
    two = write_probe(tmp_path / "two", {"0": 6, "1": 4, "log_mel": 8, "random_0": 9, "random_1": 10})
    page = results_page(read_results([one, two]), "Trial")
    assert "| linear probe: label errors, CTC loss (nats per label) | layer 0 | layer 1 |" in page
    assert "| one | 70.0%, 2.80 | **50.0%**, 2.00 |" in page
    assert "| two, random weights | **90.0%**, 3.60 | 100.0%, 4.00 |" in page
    assert page.count("| log-mel features | **80.0%**, 3.00 |  |") == 1
    interval = "lower by 37.5% (95 %: 37.5% to 37.5%), relative."
    assert f"- `one`, layer 1, against log-mel features: label errors {interval}" in page
    assert "- `two`, layer 1, against random weights, layer 0: label errors lower by 55.6%" in page
    assert "- `one`, layer 1, against `two`, layer 1: label errors higher by 25.0%" in page
    other = write_probe(tmp_path / "other", {"0": 1, "log_mel": 1, "random_0": 1}, utterances=20)
    assert "against `other`" not in results_page(read_results([one, other]), "Trial")


def test_two_probes_of_one_name_are_both_shown(tmp_path: Path) -> None:
    one = write_probe(tmp_path / "a" / "run", {"0": 7, "log_mel": 8, "random_0": 10})
    two = write_probe(tmp_path / "b" / "run", {"0": 6, "log_mel": 8, "random_0": 0})
    page = results_page(read_results([one, two]), "Trial")
    assert "| run | **70.0%**, 2.80 |" in page and "| run | **60.0%**, 2.40 |" in page
    assert page.count("against `run`, layer 0") == 2
    assert "against random weights, layer 0: label errors not comparable (the baseline makes no errors)" in page


def test_a_probe_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = write_probe(tmp_path / "one", {"0": 7, "log_mel": 8, "random_0": 10})
    document = json.loads(path.read_text())
    document["utterances"][3]["errors"].pop("log_mel")
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"probe.json: utterance u3: the errors of log_mel are missing"):
        read_results([path])
    path.write_text(json.dumps(document | {"ctc_loss": {}}))
    with pytest.raises(UserError, match=r"probe.json: the CTC loss of layer 0 is missing"):
        read_results([path])
    path.write_text(json.dumps(document | {"label_error_rate": {"first": 0.5}}))
    with pytest.raises(UserError, match="not written by w2vscale probe"):
        read_results([path])


def test_a_baseline_without_errors_is_not_comparable(tmp_path: Path) -> None:
    ours = write_score(tmp_path / "tiny_1h", ["one two three"])
    baseline = write_score(tmp_path / "tiny_1h_scratch", ["one two three four"])
    result = CliRunner().invoke(app, ["results", str(ours), str(baseline), "-o", str(tmp_path / "RESULTS.md")])
    assert "WER not comparable (the baseline makes no errors), CER not comparable" in result.output


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for name, message in (
        ("missing.json", "cannot be read: No such file"),
        ("other.json", "not written by w2vscale evaluate"),
    ):
        result = CliRunner().invoke(app, ["results", str(tmp_path / name)])
        assert isinstance(result.exception, UserError) and message in str(result.exception)
