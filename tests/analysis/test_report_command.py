"""`w2vscale report`: which paths it takes, where the report goes, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.commands import error_of
from tests.helpers.run_folders import write_run
from w2vscale.analysis.report.folders import report_path
from w2vscale.cli.app import app
from w2vscale.errors import UserError


class TestCommand:
    """`w2vscale report`."""

    def test_it_prints_a_table_and_the_path(self, tmp_path: Path) -> None:
        exps = write_run(tmp_path / "a"), write_run(tmp_path / "b")
        result = CliRunner().invoke(app, ["report", *map(str, exps)])
        assert result.exit_code == 0, result.output
        assert result.output.endswith(f"report: {tmp_path / 'report.html'}\n")
        assert "training bits" in result.output and len(result.output.splitlines()) == 4
        assert (tmp_path / "report.html").stat().st_size < 100_000
        assert not (tmp_path / "a" / "report.html").exists(), "that is the place of the report of this run alone"

    def test_its_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert report_path([Path("exp/a")]) == Path("exp/a/report.html")
        assert report_path([Path("exp/s/0"), Path("exp/s/1")]) == Path("exp/s/report.html")
        assert report_path([Path("exp/a"), Path("exp/s/1")]) == Path("exp/report.html")
        assert report_path([Path("exp/a"), Path("exp/a/again")]) == Path("exp/report.html")
        assert report_path([Path("exp/a"), tmp_path / "b"]) == Path("report.html")
        assert report_path([Path("a"), tmp_path.parent / "b"]) == tmp_path.parent / "report.html"

    def test_files_among_the_runs_are_skipped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for number in range(2):
            write_run(Path("sweep") / str(number))
        Path("sweep/multirun.yaml").write_text("hydra: {}\n")
        paths = sorted(map(str, Path("sweep").iterdir()))
        result = CliRunner().invoke(app, ["report", *paths])
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert lines[0] == "skipping sweep/multirun.yaml: not a folder" and len(lines) == 5
        assert lines[-1] == "report: sweep/report.html"
        Path("sweep/2").mkdir()
        Path("sweep/2/config.yaml").write_text("preset: tiny\n")  # it has just begun
        begun = CliRunner().invoke(app, ["report", *paths, "sweep/2"])
        assert begun.exit_code == 0 and "skipping sweep/2: no metrics yet" in begun.output.splitlines()
        assert "no metrics yet" in error_of("report", "sweep/2")
        alone = CliRunner().invoke(app, ["report", *paths[1:]])
        assert alone.output.splitlines()[-1] == "report: sweep/1/report.html"

    def test_what_is_not_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for number in range(2):
            write_run(Path("exp/sweep") / str(number))
        write_run(Path("exp/one/only"))
        Path("exp/sweep/multirun.yaml").write_text("")
        Path("exp/empty").mkdir()
        assert error_of("report", "exp/sweep/multirun.yaml") == (
            "exp/sweep/multirun.yaml: not the folder of a run: it is not a folder"
        )
        assert error_of("report", "exp/sweep") == (
            "exp/sweep: not the folder of a run; it holds the runs exp/sweep/0, exp/sweep/1: name them with "
            "exp/sweep/*/"
        )
        assert error_of("report", "exp/one") == (
            "exp/one: not the folder of a run; it holds the run exp/one/only: name it"
        )
        assert error_of("report", "exp/empty", "exp/sweep/0") == (
            "exp/empty: not the folder of a run: it has no config.yaml"
        )

    def test_each_objective_has_a_table(self, tmp_path: Path) -> None:
        exps = write_run(tmp_path / "a"), write_run(tmp_path / "b", "ctc_1h"), write_run(tmp_path / "c")
        printed = CliRunner().invoke(app, ["report", *map(str, exps)]).output.splitlines()
        assert [line.split()[0] for line in printed] == ["run", "a", "c", "run", "b", "report:"]
        assert "training bits" in printed[0] and "label errors" in printed[3]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["-o", "curves.png"], "--output curves.png: the report is an HTML file"),
            (["--reference", "mine"], "--reference mine: the only reference is: published"),
        ],
    )
    def test_options_that_do_not_exist(self, tmp_path: Path, options: list[str], message: str) -> None:
        result = CliRunner().invoke(app, ["report", str(write_run(tmp_path / "a")), *options])
        assert isinstance(result.exception, UserError) and message in str(result.exception)
