"""The report of runs: what is on the page, for any objective, and that nothing from a file becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.helpers.commands import error_of
from tests.helpers.pages import Page, report
from tests.helpers.run_folders import BACK, SPIKE, START, write_error_rates, write_run, write_samples
from w2vscale.analysis.report.page import FOLDER
from w2vscale.analysis.report.reading import names, read_run
from w2vscale.checkpoint.format import BestValidation, TrainState
from w2vscale.cli.app import app
from w2vscale.errors import UserError
from w2vscale.files import read_metrics
from w2vscale.objectives import load
from w2vscale.runs import Run
from w2vscale.training.early_stopping import describe_end

STOP = {"event": "stop", "time": "2026-11-29T22:00:00Z", "update": 60, "text": "stopped by SIGTERM"}
NUMBERS = st.integers() | st.floats() | st.none() | st.sampled_from([10**400, -(10**400), 1e308, -1e308, 5e-324, 0, -1])
RECORDS = st.fixed_dictionaries(
    {"split": st.sampled_from(["train", "validation", "roll_back"]), "update": NUMBERS},
    optional=dict.fromkeys(("hours_seen", "accuracy", "grad_norm", "lr", "padding", "code_perplexity_0"), NUMBERS),
)
EVIL = """"><img src=x onerror=alert(1)><script>alert('&amp;')<!--"""


def titles(page: Page) -> list[str]:
    """The titles of the plots."""
    figures = [one.attributes.get("aria-label") or "" for one in page.all("svg", class_="by-updates")]
    return [label.partition(" (")[0] for label in figures]


def test_records_of_a_split_without_an_incomplete_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"split": "train", "update": 1}\n{"split": "validation", "update": 1}\n{"split": "train", "upd')
    assert read_metrics(path, "train") == [{"split": "train", "update": 1}]
    assert read_metrics(path, "validation") == [{"split": "validation", "update": 1}]
    with pytest.raises(UserError, match=r"absent\.jsonl: cannot be read: No such file"):
        read_metrics(tmp_path / "absent.jsonl", "train")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped, with a log of events."""
    settings = ("trainer.updates=200", "optim.lr=1e-3", "data.train=cuts_train.jsonl")
    events = (START, SPIKE, SPIKE, BACK, STOP)
    return write_run(tmp_path_factory.mktemp("one") / "mine", "tiny", *settings, events=events, roll_backs=(30,))


@pytest.fixture(scope="module")
def page(stopped: Path) -> Page:
    """Its report."""
    return report(stopped.parent, stopped)


class TestOneRun:
    """A run with a log of events."""

    def test_its_state(self, page: Page) -> None:
        assert page_title(page) == "mine: report"
        assert page.one("span", class_="stopped").text == "stopped at update 100 of 200"
        card = page.one("li")
        assert "stopped by SIGTERM" in card.text and "95M parameters" in card.text

    def test_its_curves(self, page: Page) -> None:
        assert titles(page) == ["bits", "accuracy", "codes", "gradient norm", "learning rate", "throughput"]
        assert len(page.all("svg", class_="by-hours")) == 6
        names_of_curves = {one.attributes.get("data-name") for one in page.all("path")} - {None}
        assert names_of_curves == {
            "mine, training", "mine, validation", "mine, codebook 0, training", "mine, codebook 1, training",
        }  # fmt: skip
        log = [one.attributes for one in page.all("svg", class_="chart") if "data-log" in one.attributes]
        assert [attributes["aria-label"].partition(" ")[0] for attributes in log] == ["gradient"] * 2  # type: ignore[union-attr]
        assert len([one for one in page.all("text") if one.text == "chance"]) == 4

    def test_where_it_went_back_and_was_in_trouble(self, page: Page) -> None:
        assert len(page.all("path", class_="back")) == len(page.all("path", class_="warning")) == 12
        marked = {one.text for one in page.all("path", class_="back")}
        assert marked == {"mine, update 30: went back to this checkpoint"}
        assert [row[:4] for row in page.rows("health events")[1:]] == [
            ["mine", "40", "health: spike", "the loss spikes"],
            ["mine", "30", "went back", "from update 50. going back to update 30"],
            ["mine", "60", "stopped", "stopped by SIGTERM"],
        ]
        note = (
            "In the curves, ▲ marks a warning or health event and a vertical dashed line the update to which a run went"
        )
        assert f"{note} back." in [one.text for one in page.all("p")]

    def test_its_metrics(self, stopped: Path, page: Page) -> None:
        rows = dict(row for row in page.rows("latest metrics"))
        assert (rows["update"], rows["hours seen"]) == ("100", "1.11")
        run = read_run(stopped)
        codes = [run.train[-1][f"code_perplexity_{one}"] for one in (0, 1)]
        assert rows["accuracy, validation"] == f"{run.validation[-1]['accuracy']:.3f}"
        assert rows["codes, training"] == f"{codes[0]:.3f} / {codes[1]:.3f}"

    def test_settings_that_are_not_of_its_preset(self, page: Page) -> None:
        rows = page.rows("settings")
        assert rows[0] == ["setting", "mine", "preset tiny", "meaning"]
        assert {row[0]: row[1:3] for row in rows[1:]} == {
            "trainer.updates": ["200", "400"], "optim.lr": ["0.001", "0.002"],
            "data.train": ["[cuts_train.jsonl]", "[]"],
        }  # fmt: skip
        assert page.one("pre").text == "#!/usr/bin/env bash w2vscale train tiny"

    def test_data_and_hardware(self, page: Page) -> None:
        data, hardware = (dict(row for row in page.rows(label)) for label in ("Data", "Hardware"))
        assert data["training set"] == "961 h in 281,241 utterances"
        assert (data["padding"], data["training manifests"]) == ("3.1%", "cuts_train.jsonl")
        assert hardware["devices"] == "8 NVIDIA H100" and hardware["software"].endswith("PyTorch 2.13.0, CUDA 13.0")
        assert hardware["parameters"] == "95,044,608, 95,000,000 of them trained"
        assert hardware["starts"] == "at update 0, 2026-11-29 20:07 UTC"

    def test_nothing_is_loaded_and_nothing_else_can_run(self, page: Page) -> None:
        policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"] or ""
        assert policy.startswith("default-src 'none'; ")
        for tag in ("style", "script"):
            content = "".join(page.one(tag).parts)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'; " in policy
        assert "unsafe" not in policy and "http" not in policy
        used = {name for one in page.elements for name in one.attributes}
        assert used.isdisjoint({"src", "srcset", "style", "data", "action"}), used
        assert not [name for name in used if name.startswith("on")]
        assert all((one.attributes["href"] or "").startswith("#") for one in page.all("a"))
        assert not re.search(r"url\(|@import|fetch|http", (FOLDER / "style.css").read_text())

    def test_every_box_that_scrolls_can_be_reached_by_keyboard(self, page: Page) -> None:
        boxes = [*page.all("div", class_="scroll"), *page.all("pre")]
        assert len(boxes) >= 5
        assert all(one.attributes["tabindex"] == "0" and one.attributes["aria-label"] for one in boxes)


class TestFurtherValidationSets:
    """Each set of data.validation_sets has a line, a name and rows of its own."""

    SETS = "data={validation: a.jsonl, validation_sets: {dev-other: b.jsonl, swedish: c.jsonl}}"

    def test_of_one_run(self, tmp_path: Path) -> None:
        exp = write_run(tmp_path / "mine", "tiny", self.SETS)
        page = report(tmp_path, exp)
        lines = page.all("path", class_="further")
        found = {one.attributes["data-name"] for one in lines}
        assert found == {"mine, dev-other, validation", "mine, swedish, validation"}
        assert len(lines) == 2 * 2 * 2, "of two sets in two plots on two axes"
        assert [one.text for one in page.all("text")].count("swedish") == 2 * 2
        data = dict(row for row in page.rows("Data"))
        assert (data["validation set dev-other"], data["validation set swedish"]) == ("b.jsonl", "c.jsonl")
        assert any("Thin line with markers and a name: a further" in one.text for one in page.all("p", class_="key"))
        rows = dict(row for row in page.rows("latest metrics"))
        for place, split in enumerate(("validation", "validation dev-other", "validation swedish")):
            assert rows[f"accuracy, {split}"] == f"{read_run(exp).validation[-1]['accuracy'] + place:.3f}"

    def test_a_single_set_has_a_name_and_runs_without_it_no_value(self, tmp_path: Path) -> None:
        one = "data={validation: a.jsonl, validation_sets: {swedish: c.jsonl}}"
        page = report(tmp_path, write_run(tmp_path / "x", "tiny", one), write_run(tmp_path / "y", "tiny"))
        assert [one.text for one in page.all("text")].count("swedish") == 2 * 2
        rows = {row[0]: row[1:] for row in page.rows("latest metrics")}
        assert rows["bits, validation swedish"][1] == "–" != rows["bits, validation swedish"][0]


class TestSeveralRuns:
    """Runs of one objective share their panels; others share those with the same title."""

    def test_pretraining_and_fine_tuning(self, tmp_path: Path) -> None:
        exps = write_run(tmp_path / "pretrained", roll_backs=(30,)), write_run(tmp_path / "tuned", "ctc_1h")
        page = report(tmp_path, *exps)
        common = ["gradient norm", "learning rate", "throughput"]
        assert titles(page) == ["bits", "accuracy", "codes", "loss", "label errors", "WER", *common]
        curves = {}
        for chart in page.all("svg", class_="by-updates"):
            label = chart.attributes["aria-label"] or ""
            curves[label.partition(" (")[0]] = sorted(
                set(re.findall(r"(?:pretrained|tuned), (?:training|validation)", label))
            )
        assert curves["accuracy"] == ["pretrained, training", "pretrained, validation"]
        assert curves["WER"] == ["tuned, validation"]
        assert curves["gradient norm"] == ["pretrained, training", "tuned, training"]
        back = page.all("path", class_="back")
        assert len(back) == 2 * 6, "in the panels of its objective and in those of all"
        settings = page.rows("settings")
        assert settings[0] == ["setting", "pretrained", "tuned", "meaning"]
        assert ["objective.name", "wav2vec2", "ctc"] in [row[:3] for row in settings]
        assert [one.text for one in page.all("span", class_="state")] == ["update 100 of 400", "update 100 of 13,000"]

    def test_two_ways_of_pretraining(self, tmp_path: Path) -> None:
        page = report(tmp_path, write_run(tmp_path / "one"), write_run(tmp_path / "other", "best_rq_tiny"))
        assert titles(page)[:3] == ["bits", "accuracy", "codes"]
        label = page.all("svg", class_="by-updates")[1].attributes["aria-label"] or ""
        assert label.startswith(
            "accuracy (contrastive accuracy · accuracy of masked codes) over updates. one, training"
        )
        assert "other, validation" in label
        assert len(page.all("g", class_="chance")) == 8, "two levels in two plots on two axes"

    def test_each_has_a_line_style_and_a_box_that_hides_it(self, tmp_path: Path) -> None:
        exps = [write_run(tmp_path / name / "exp", updates=20) for name in ("a", "b", "c")]
        page = report(tmp_path, *exps)
        styles = "".join(page.one("style").parts)
        for number, name in enumerate(("a/exp", "b/exp", "c/exp")):
            assert page.one("input", id=f"show-{number}")
            assert f"body:has(#show-{number}:not(:checked)) .plots .run-{number}{{display:none}}" in styles
            groups = page.all("g", class_=f"run-{number}")
            assert groups and {one.attributes["class"] for one in groups} == {f"run-{number} style-{number}"}
            assert name in [one.text for one in page.all("label")]
        assert len(set(re.findall(r"--dash: [^;}]+", styles))) == 8
        assert len(set(re.findall(r"--run-[0-7]: #[0-9a-f]+", styles))) == 16, "light and dark"

    def test_names_are_as_long_as_they_have_to_be(self, tmp_path: Path) -> None:
        one, other = tmp_path / "x" / "exp", tmp_path / "y" / "exp"
        assert names([one]) == ["exp"]
        assert names([one, other, one]) == ["x/exp", "y/exp", "x/exp (2)"]


class TestNames:
    """Texts from files stay texts."""

    def test_no_text_becomes_markup(self, tmp_path: Path) -> None:
        name = EVIL.replace("/", "")
        events = [
            event | {"text": EVIL, "host": EVIL, "devices": EVIL, "time": EVIL} for event in (START, SPIKE, BACK, STOP)
        ]
        exp = write_run(tmp_path / name, "tiny", f"data.train=[{json.dumps(EVIL)}]", events=events, roll_backs=(30,))
        (exp / "run.sh").write_text(shlex.quote(f"</pre></script>{EVIL}"))
        write_samples(exp, 100, name)
        write_error_rates(exp / "wer.json", [(EVIL, "b"), (f"a {EVIL} c", "a c")], speaker=EVIL)
        document = json.loads((exp / "wer.json").read_text()) | {"cuts": [EVIL], "decoding": EVIL}
        (exp / "wer.json").write_text(json.dumps(document))
        evaluation = {"update": 100, "utterances": 3.0, "table": {EVIL: EVIL}}
        (exp / f"{name}.json").write_text(json.dumps(evaluation))
        (exp / "damaged.json").write_text(json.dumps({"wer": EVIL}))
        page = report(tmp_path, exp)
        assert page.one("h1").text == f"Report of {name}"
        assert "".join(page.one("script").parts) == (FOLDER / "script.js").read_text()
        assert len(page.all("img")) == 1
        assert not [key for one in page.elements for key in one.attributes if key.startswith("on")]
        (text,) = [one.text for one in page.all("pre")]
        assert text == shlex.quote(f"</pre></script>{EVIL}")
        assert page.rows("error rates")[1][1:3] == [EVIL, EVIL]
        assert [EVIL, EVIL] in page.rows("evaluations")
        assert any("damaged.json: not written by w2vscale evaluate" in one.text for one in page.all("p"))

    def test_bytes_that_are_no_text_are_written_out(self, tmp_path: Path) -> None:
        exp = write_run(tmp_path / "a\udcff\x1b[31m")
        assert page_title(report(tmp_path, exp)) == "a\\udcff\\u001b[31m: report"

    @settings(max_examples=10)
    @given(st.lists(RECORDS, max_size=6))
    def test_any_metrics(self, records: list[dict[str, object]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            exp = write_run(Path(folder) / "exp", updates=20)
            good = (exp / "metrics.jsonl").read_text()
            (exp / "metrics.jsonl").write_text(good + "".join(json.dumps(one) + "\n" for one in records))
            page = report(Path(folder), exp)
        assert len(titles(page)) == 6
        assert "nan" not in "".join(one.attributes.get("d") or "" for one in page.all("path"))

    def test_metrics_that_cannot_be_drawn(self, tmp_path: Path) -> None:
        exp = write_run(tmp_path / "exp", updates=20)
        odd = [
            {"accuracy": None}, {"accuracy": 1e300, "grad_norm": 0.0}, {"accuracy": -1e-300, "grad_norm": -5},
            {"grad_norm": 5e-324}, {"update": 10**18}, {"hours_seen": 1e300}, {"hours_seen": -1.0},
        ]  # fmt: skip
        lines = [{"split": "train", "update": 30 + n, "hours_seen": 1.0, **values} for n, values in enumerate(odd)]
        with (exp / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        page = report(tmp_path, exp)
        paths = "".join(one.attributes.get("d") or "" for one in page.all("path"))
        assert "nan" not in paths and "inf" not in paths


def page_title(page: Page) -> str:
    """The title of a page. Marks have titles, too."""
    return page.all("title")[0].text


def test_the_settings_of_a_run_include_no_other_file(tmp_path: Path) -> None:
    exp = write_run(tmp_path / "exp")
    (tmp_path / "other.yaml").write_text("preset: base\n")
    (exp / "config.yaml").write_text("extends: ../other.yaml\n")
    assert error_of("report", exp) == f"{exp}: extends: no run writes this; its config.yaml has all settings"


def test_a_run_may_have_the_name_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "base", "tiny", "trainer.updates=70")
    monkeypatch.chdir(tmp_path)
    assert read_run(Path("base")).config.trainer.updates == Run("base").config.trainer.updates == 70


def test_a_run_without_events_has_a_report(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "exp", "tiny", "trainer.updates=100", roll_backs=(50,)))
    assert page.one("span", class_="complete").text == "complete"
    assert page.rows("health events")[1][:3] == ["exp", "50", "went back"]
    data, hardware = (dict(row for row in page.rows(label)) for label in ("Data", "Hardware"))
    assert data["padding"] == "10.0% (latest log line)" and "training set" not in data
    assert hardware == {"hardware": "exp", "engine": "ddp"}


def test_a_run_that_early_stopping_has_ended_is_complete(tmp_path: Path) -> None:
    settings = ("trainer.early_stopping=2", "trainer.updates=200", "data.validation=v.jsonl")
    config, _ = load("tiny", settings)
    text = describe_end(TrainState(update=100, best=BestValidation("loss", 2.5, 60, since=2)), config, tmp_path)
    end = STOP | {"update": 100, "text": text, "early": True}
    page = report(tmp_path, write_run(tmp_path / "exp", "tiny", *settings, events=(START, end)))
    assert page.one("span", class_="state").text == "complete: stopped early at update 100 of 200"
    assert page.all("span", class_="complete") and not page.all("span", class_="stopped")
    assert "2 validations without a loss below 2.5, that of update 60" in page.one("li").text
    assert page.rows("health events")[1][:3] == ["exp", "100", "stopped early"]
    assert "In the curves" not in page.one("section", aria_labelledby="health").text, "nothing is marked there"
    again = report(tmp_path, write_run(tmp_path / "again", "tiny", *settings, events=(START, end, START)))
    assert again.one("span", class_="state").text == "update 100 of 200", "it was continued"


def test_rates_are_in_percent_and_amounts_in_hours(tmp_path: Path) -> None:
    odd = START | {"epochs": 40 / 3, "training": {"hours": 0.05323, "utterances": 48}, "validation": "0.0628 h in 58"}
    exp = write_run(tmp_path / "exp", "ctc_1h", events=(odd,))
    wer = read_run(exp).validation[-1]["wer"]
    page = report(tmp_path, exp)
    assert dict(page.rows("latest metrics"))["WER, validation"] == f"{wer:.1%}"
    (chart, _) = [one for one in page.all("svg", class_="chart") if (one.attributes["aria-label"] or "")[:3] == "WER"]
    assert "data-percent" in chart.attributes and (chart.attributes["aria-label"] or "").endswith("%")
    assert any(one.text.endswith("0%") for one in page.all("text"))
    printed = CliRunner().invoke(app, ["report", str(exp)]).output
    assert f"{wer:.1%}" in printed and "hours seen" in printed
    data = dict(page.rows("Data"))
    assert (data["epochs"], data["training set"], data["validation set"]) == (
        "13.3", "0.0532 h in 48 utterances", "0.0628 h in 58",
    )  # fmt: skip


def test_a_run_without_trouble_says_so(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "exp"))
    assert "No trouble is recorded." in [one.text for one in page.all("p")]
    assert not page.all("path", class_="back")


class TestPublished:
    """Published curves beside those of a run."""

    def test_the_accuracies_of_base(self, tmp_path: Path) -> None:
        exp = write_run(tmp_path / "exp", "base", updates=120_000, every=1000)
        page = report(tmp_path, exp, published=True)
        (curve,) = [one for one in page.all("path") if one.attributes.get("data-name") == "BASE, published"]
        (chart,) = [
            one for one in page.all("svg", class_="by-updates") if "accuracy" in (one.attributes["aria-label"] or "")
        ]
        x, y = ([float(one) for one in (chart.attributes[axis] or "").split()] for axis in ("data-x", "data-y"))
        found = {}
        for place in re.findall(r"[ML](\S+) (\S+?)(?=[Lh]|$)", curve.attributes["d"] or ""):
            update = x[0] + (float(place[0]) - x[2]) / (x[3] - x[2]) * (x[1] - x[0])
            value = y[0] + (float(place[1]) - y[2]) / (y[3] - y[2]) * (y[1] - y[0])
            found[round(update, -4)] = value
        expected = {50_000: 0.491, 100_000: 0.537, 150_000: 0.564}
        assert found == {at: pytest.approx(value, abs=0.004) for at, value in expected.items()}
        assert "objective.mask_trim=micro_batch" in page.one("section", aria_labelledby="curves").text
        assert page.all("a")[-1].attributes["href"] == page.all("a")[-1].text

    def test_a_short_run_stays_readable(self, tmp_path: Path) -> None:
        page = report(tmp_path, write_run(tmp_path / "exp", "base", updates=100), published=True)
        charts = [one.attributes for one in page.all("svg", class_="by-updates")]
        assert {(chart["data-x"] or "").split()[1] for chart in charts} == {"100"}
        assert not page.all("g", class_="published")
        assert page.one("p", class_="beyond").text == (
            "BASE, published (beyond this axis): 0.491 at 50,000 updates, 0.537 at 100,000, …"
        )
        assert "0.629 at 400,000." in page.one("section", aria_labelledby="curves").text

    def test_only_when_asked_for(self, tmp_path: Path) -> None:
        assert not report(tmp_path, write_run(tmp_path / "exp")).all("g", class_="published")

    def test_nothing_is_published_on_fine_tuning(self, tmp_path: Path) -> None:
        exp = write_run(tmp_path / "exp", "ctc_1h")
        with pytest.raises(UserError, match=r"nothing is published on objective\.name=ctc"):
            report(tmp_path, exp, published=True)


def test_the_nearest_preset_is_the_one_a_run_came_from(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "exp", "large", "objective.mask_trim=micro_batch"))
    assert page.rows("settings") == [
        ["setting", "exp", "preset large", "meaning"],
        ["objective.mask_trim", "micro_batch", "none", page.rows("settings")[1][3]],
    ]
