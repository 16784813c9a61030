"""The recipes' shell helpers: options after Kaldi's contract (parse_options.sh), logs and stages (log.sh)."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

UTILS = Path(__file__).resolve().parents[2] / "recipes" / "utils"

OPTIONS_SCRIPT = f"""#!/usr/bin/env bash
# shellcheck disable=SC2034
# Trains a model.
#
#   run.sh [options] [corpus...]
set -euo pipefail

stage=1                 # first stage to run
stop_stage=9
train_cuts="mini cuts"  # what to train on
quick=false             # a short run
notes=
sizes=(1 2)
readonly fixed=3
Upper=4
  indented=5
. {UTILS}/parse_options.sh
later=6

printf '%s|' "$stage" "$stop_stage" "$train_cuts" "$quick" "$notes" "$fixed" "$later" "$@"
"""

STAGES_SCRIPT = f"""#!/usr/bin/env bash
set -euo pipefail
stage=1
stop_stage=9
. {UTILS}/parse_options.sh
. {UTILS}/log.sh
prepare() {{ echo "prepare $*"; }}
train() {{ echo train; false_unless_fixed; echo trained; }}
false_unless_fixed() {{ [[ -e fixed ]]; }}
run_stage 1 "Prepare the data" data prepare quickly
run_stage 2 "Train" "exp/a run" train
echo end
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Writes a script to run.sh and calls it with arguments, from its own folder unless told otherwise."""

    def call(
        text: str, *arguments: str, path: str = "./run.sh", cwd: Path = tmp_path
    ) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "run.sh"
        script.write_text(text)
        script.chmod(0o755)
        return subprocess.run([path, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)

    return call


def values(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.split("|")[:-1]


DEFAULTS = ["1", "9", "mini cuts", "false", "", "3", "6"]


class TestParseOptions:
    def test_defaults_stay_without_options(self, run: Run) -> None:
        assert values(run(OPTIONS_SCRIPT)) == DEFAULTS

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--stop-stage", "3", "--train-cuts", "a b"),
            ("--stop-stage=3", "--train-cuts=a b"),
            ("--stop_stage", "3", "--train_cuts=a b"),
        ],
    )
    def test_sets_variables(self, run: Run, arguments: tuple[str, ...]) -> None:
        assert values(run(OPTIONS_SCRIPT, *arguments)) == ["1", "3", "a b", "false", "", "3", "6"]

    @pytest.mark.parametrize("value", ["", "a=b", "--train", "-1", "$(false)", "two\nlines", "'\"\\"])
    @pytest.mark.parametrize("joined", [True, False])
    def test_takes_any_value_as_it_is(self, run: Run, value: str, joined: bool) -> None:
        arguments = [f"--train-cuts={value}"] if joined else ["--train-cuts", value]
        assert values(run(OPTIONS_SCRIPT, *arguments))[2] == value

    def test_last_of_a_repeated_option_wins(self, run: Run) -> None:
        assert values(run(OPTIONS_SCRIPT, "--stage", "2", "--stage", "5"))[0] == "5"

    @pytest.mark.parametrize(
        ("arguments", "left"),
        [
            (["--stage", "2", "a b", "", "c"], ["a b", "", "c"]),
            (["a", "--stage", "2"], ["a", "--stage", "2"]),
            (["--stage", "2", "--", "--stage", "3"], ["--stage", "3"]),
            (["--"], []),
        ],
    )
    def test_leaves_positional_arguments(self, run: Run, arguments: list[str], left: list[str]) -> None:
        assert values(run(OPTIONS_SCRIPT, *arguments))[7:] == left

    @pytest.mark.parametrize("value", ["true", "false"])
    def test_booleans_take_true_and_false(self, run: Run, value: str) -> None:
        assert values(run(OPTIONS_SCRIPT, "--quick", value))[3] == value

    @pytest.mark.parametrize(
        "arguments", [["--quick"], ["--quick", "--stage", "1"], ["--quick", "--"], ["--stage=1", "--quick"]]
    )
    def test_booleans_without_a_value_are_true(self, run: Run, arguments: list[str]) -> None:
        assert values(run(OPTIONS_SCRIPT, *arguments))[3] == "true"

    def test_booleans_without_a_value_leave_settings_after_dashes(self, run: Run) -> None:
        assert values(run(OPTIONS_SCRIPT, "--quick", "--", "optim.lr=1"))[3:] == ["true", "", "3", "6", "optim.lr=1"]
        # Without the dashes, the next word could be a value that was meant and mistyped.
        assert run(OPTIONS_SCRIPT, "--quick", "optim.lr=1").returncode == 2

    @pytest.mark.parametrize("value", ["maybe", "", "True", "1", "truefalse"])
    def test_booleans_take_nothing_else(self, run: Run, value: str) -> None:
        result = run(OPTIONS_SCRIPT, "--quick", value)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"run.sh: --quick takes true or false, not '{value}'\n"

    @pytest.mark.parametrize(
        "name",
        [
            "foo-bar",
            "stag",
            "fixed",
            "sizes",
            "later",
            "Upper",
            "indented",
            "path",
            "po-name",
            "",
            "a b",
            "x;y",
        ],
    )
    def test_names_the_valid_options_for_an_unknown_one(self, run: Run, name: str) -> None:
        result = run(OPTIONS_SCRIPT, f"--{name}=x")
        assert (result.returncode, result.stdout) == (2, "")
        valid = "--stage --stop-stage --train-cuts --quick --notes"
        assert result.stderr == f"run.sh: unknown option --{name} (valid: {valid})\n"

    def test_environment_variables_are_no_options(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("elsewhere", "1")
        assert run(OPTIONS_SCRIPT, "--elsewhere", "2").returncode == 2

    def test_a_missing_value_fails(self, run: Run) -> None:
        result = run(OPTIONS_SCRIPT, "--stage")
        assert (result.returncode, result.stderr) == (2, "run.sh: --stage needs a value\n")

    def test_an_option_in_place_of_a_value_fails(self, run: Run) -> None:
        result = run(OPTIONS_SCRIPT, "--train-cuts", "--stage", "2")
        assert result.returncode == 2
        assert result.stderr.startswith("run.sh: --train-cuts needs a value; the next word is the option --stage")
        assert values(run(OPTIONS_SCRIPT, "--train-cuts=--stage"))[2] == "--stage"

    @pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--stage", "5", "--help", "--unknown"]])
    def test_help_shows_the_comment_and_the_defaults(self, run: Run, arguments: list[str]) -> None:
        result = run(OPTIONS_SCRIPT, *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.splitlines() == [
            "Trains a model.",
            "",
            "  run.sh [options] [corpus...]",
            "",
            "Options and their defaults:",
            "  --stage 1                      first stage to run",
            "  --stop-stage 9",
            "  --train-cuts mini cuts         what to train on",
            "  --quick false                  a short run",
            '  --notes ""',
        ]

    def test_script_may_change_directory_first(self, run: Run, tmp_path: Path) -> None:
        moving = OPTIONS_SCRIPT.replace("set -euo pipefail\n", 'set -euo pipefail\ncd "$(dirname "$0")"\n')
        (tmp_path / "deep" / "down").mkdir(parents=True)
        for cwd, path in [
            (tmp_path.parent, f"{tmp_path.name}/run.sh"),
            (tmp_path / "deep" / "down", "../../run.sh"),
        ]:
            assert values(run(moving, "--stage", "4", path=path, cwd=cwd))[0] == "4"

    def test_says_when_the_script_cannot_be_read(self) -> None:
        result = subprocess.run(
            ["bash", "-c", f"stage=1\n. {UTILS}/parse_options.sh"], capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 2
        assert "cannot find the script " in result.stderr

    def test_leaves_no_names_behind(self, run: Run) -> None:
        script = f"stage=1\n. {UTILS}/parse_options.sh\nset | grep _po_ || echo clean\n"
        assert run("#!/usr/bin/env bash\n" + script, "--stage", "2").stdout == "clean\n"


class TestLog:
    def test_prints_time_place_and_message_on_stderr(self, run: Run) -> None:
        result = run(f"#!/usr/bin/env bash\nset -euo pipefail\n. {UTILS}/log.sh\nlog one 'two  %s'\n")
        assert (result.returncode, result.stdout) == (0, "")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(run\.sh:4\) one two  %s\n", result.stderr)

    def test_names_the_line_inside_a_function(self, run: Run) -> None:
        result = run(f"#!/usr/bin/env bash\n. {UTILS}/log.sh\nf() {{\n  log inside\n}}\nf\n")
        assert "(run.sh:4) inside" in result.stderr


class TestRunStage:
    @pytest.fixture(autouse=True)
    def fixed(self, tmp_path: Path) -> Path:
        """Lets stage 2 succeed; a test removes it to see a failure in the middle of the stage."""
        (tmp_path / "fixed").touch()
        return tmp_path / "fixed"

    def test_runs_all_stages_and_marks_them(self, run: Run, tmp_path: Path) -> None:
        result = run(STAGES_SCRIPT)
        assert (result.returncode, result.stdout) == (0, "prepare quickly\ntrain\ntrained\nend\n")
        assert re.search(
            r"\(run\.sh:10\) stage 1: Prepare the data\n.*\(run\.sh:10\) stage 1: done in \d+ s",
            result.stderr,
        )
        assert (tmp_path / "data" / ".prepare.done").read_text()
        assert (tmp_path / "exp" / "a run" / ".train.done").read_text()

    @pytest.mark.parametrize(
        ("arguments", "output"),
        [
            (["--stage", "2"], "train\ntrained\nend\n"),
            (["--stop-stage", "1"], "prepare quickly\nend\n"),
            (["--stage", "3", "--stop-stage", "2"], "end\n"),
            (["--stage", "-1", "--stop-stage", "0"], "end\n"),
        ],
    )
    def test_respects_the_range(self, run: Run, arguments: list[str], output: str) -> None:
        assert run(STAGES_SCRIPT, *arguments).stdout == output

    def test_skips_a_finished_stage_even_alone(self, run: Run, tmp_path: Path) -> None:
        run(STAGES_SCRIPT)
        again = run(STAGES_SCRIPT, "--stage", "2", "--stop-stage", "2")
        assert (again.returncode, again.stdout) == (0, "end\n")
        assert "stage 2: done already (rm exp/a run/.train.done to redo)" in again.stderr
        (tmp_path / "exp" / "a run" / ".train.done").unlink()
        assert run(STAGES_SCRIPT).stdout == "train\ntrained\nend\n"

    def test_a_failed_command_ends_the_recipe_without_a_mark(self, run: Run, tmp_path: Path, fixed: Path) -> None:
        fixed.unlink()
        failed = run(STAGES_SCRIPT)
        assert failed.returncode == 1
        assert failed.stdout == "prepare quickly\ntrain\n", "`set -e` holds inside the stage"
        assert not (tmp_path / "exp").exists()
        fixed.touch()
        assert run(STAGES_SCRIPT).stdout == "train\ntrained\nend\n"

    def test_a_failed_stage_has_no_mark_without_errexit(self, run: Run, tmp_path: Path) -> None:
        script = f"#!/usr/bin/env bash\nstage=1 stop_stage=1\n. {UTILS}/log.sh\nfail() {{ return 3; }}\n"
        assert run(script + "run_stage 1 Fail out fail\necho $?\n").stdout == "3\n"
        assert not (tmp_path / "out").exists()

    def test_an_empty_mark_does_not_count(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / ".prepare.done").touch()
        assert run(STAGES_SCRIPT, "--stop-stage", "1").stdout == "prepare quickly\nend\n"

    @pytest.mark.parametrize("value", ["two", "", "08", "1.5"])
    def test_refuses_a_stage_that_is_no_number(self, run: Run, value: str) -> None:
        result = run(STAGES_SCRIPT, f"--stop-stage={value}")
        assert (result.returncode, result.stdout) == (2, "")


def test_utils_are_shellcheck_clean() -> None:
    # Beside the interpreter: the environment need not be on PATH.
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(path for path in UTILS.rglob("*") if path.suffix in (".sh", ".sbatch"))
    assert scripts
    result = subprocess.run(
        [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", *scripts],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
