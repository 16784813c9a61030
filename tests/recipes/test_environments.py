"""path.sh: which environment a recipe uses, with real ones. tools/setup.sh is real, too, but has nothing to install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers.processes import setup_key

ROOT = Path(__file__).resolve().parents[2]
FILES = ("recipes/utils/path.sh", "tools/setup.sh", "pyproject.toml", "tools/constraints.txt")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a package, and an environment .venv that tools/setup.sh has finished."""
    folder = tmp_path / "checkout"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "w2vscale").symlink_to(ROOT / "w2vscale")
    finished_by_setup(folder / ".venv", folder)
    (folder / "run.sh").write_text(
        "set -euo pipefail\n. recipes/utils/path.sh\ncommand -v python\npython -c 'import w2vscale'\n"
    )
    return folder


def finished_by_setup(folder: Path, checkout: Path) -> None:
    own(folder, checkout)
    (folder / ".w2vscale-setup").write_text(setup_key(checkout))


def own(folder: Path, checkout: Path | None) -> Path:
    """Make an environment with the packages of this one; w2vscale is that of `checkout`, or missing."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    if checkout is not None:
        (packages / "editable.pth").write_text(f"{checkout}\n{sysconfig.get_path('purelib')}\n")
        command = folder / "bin" / "w2vscale"
        command.write_text(f"#!{folder}/bin/python\nfrom w2vscale.cli.app import main\nmain()\n")
        command.chmod(0o755)
    return folder


NAMES = ("W2VSCALE_VENV", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHON")


def clean(**environment: object) -> dict[str, str]:
    """The variables for a script: none that chooses an environment, and pip installs nothing."""
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    return kept | {"PIP_NO_INDEX": "1", "PIP_DRY_RUN": "1"} | {name: str(value) for name, value in environment.items()}


def run(checkout: Path, code: int = 0, **environment: object) -> tuple[str, list[str]]:
    """The folder of the environment that is used, and the lines on stderr."""
    done = subprocess.run(
        ["bash", "run.sh"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean(**environment),
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout.strip().removesuffix("/bin/python"), done.stderr.splitlines()


def contents(folder: Path) -> dict[Path, float]:
    return {path: path.lstat().st_mtime for path in folder.rglob("*") if path.suffix != ".pyc"}


def test_without_variables_the_checkout_has_its_own(checkout: Path) -> None:
    assert run(checkout) == (f"{checkout}/.venv", [])
    assert run(checkout, VIRTUAL_ENV=checkout / ".venv") == (f"{checkout}/.venv", [])


def test_a_named_environment_that_setup_made_is_used_and_kept_up_to_date(checkout: Path, tmp_path: Path) -> None:
    finished_by_setup(tmp_path / "named", checkout)
    assert run(checkout, W2VSCALE_VENV=tmp_path / "named", VIRTUAL_ENV="/nowhere") == (f"{tmp_path}/named", [])
    # tools/setup.sh would now update it, and says which Python it cannot run.
    _, lines = run(checkout, 1, W2VSCALE_VENV=tmp_path / "named", PYTHON="/no/python")
    assert lines[-1] == "setup: cannot run /no/python; set PYTHON to a Python 3.11 to 3.14"


def test_a_named_environment_that_does_not_exist_is_made_by_setup(checkout: Path, tmp_path: Path) -> None:
    _, lines = run(checkout, 1, W2VSCALE_VENV=tmp_path / "new", PYTHON="/no/python")
    assert lines[-1] == "setup: cannot run /no/python; set PYTHON to a Python 3.11 to 3.14"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").touch()
    _, lines = run(checkout, 1, W2VSCALE_VENV=tmp_path / "folder")
    assert "exists and was not made by this script" in lines[-1]
    assert os.listdir(tmp_path / "folder") == ["thesis.txt"]


@pytest.mark.parametrize("variable", ["W2VSCALE_VENV", "VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_environment_of_ones_own_is_used_as_it_is(checkout: Path, tmp_path: Path, variable: str) -> None:
    folder = own(tmp_path / "my own", checkout)
    before = contents(folder)
    said = [] if variable == "W2VSCALE_VENV" else [f"run.sh: using the active environment {folder}"]
    assert run(checkout, 0, **{variable: folder}) == (str(folder), said)
    assert contents(folder) == before


def test_a_named_environment_without_the_package_says_what_to_run(checkout: Path, tmp_path: Path) -> None:
    folder = own(tmp_path / "bare", None)
    assert run(checkout, 2, W2VSCALE_VENV=folder)[1] == [
        f"run.sh: W2VSCALE_VENV={folder}: w2vscale is not installed there: run {folder}/bin/pip install -e {checkout}"
    ]
    # The package is not taken from the current folder or from PYTHONPATH: commands need an installed one.
    assert run(checkout, 2, W2VSCALE_VENV=folder, PYTHONPATH=checkout)[1]


def test_an_active_environment_without_the_package_is_named(checkout: Path, tmp_path: Path) -> None:
    folder = own(tmp_path / "bare", None)
    assert run(checkout, CONDA_PREFIX=folder) == (
        f"{checkout}/.venv",
        [f"run.sh: using {checkout}/.venv: w2vscale is not installed in the active environment {folder}"],
    )


def test_the_package_of_another_checkout_is_a_warning(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "w2vscale", other / "w2vscale", ignore=shutil.ignore_patterns("__pycache__"))
    folder = own(tmp_path / "own", other)
    warning = f"run.sh: warning: {folder} has the w2vscale of {other}, not of this checkout {checkout}"
    assert run(checkout, W2VSCALE_VENV=folder) == (str(folder), [warning])
    assert run(checkout, VIRTUAL_ENV=folder)[1] == [f"run.sh: using the active environment {folder}", warning]


def test_the_environment_of_another_checkout_is_not_ones_own(checkout: Path, tmp_path: Path) -> None:
    folder = own(tmp_path / "other", checkout)
    (folder / ".w2vscale-setup").write_text("another\n")
    assert run(checkout, VIRTUAL_ENV=folder) == (
        f"{checkout}/.venv",
        [f"run.sh: using {checkout}/.venv: the active environment {folder} belongs to another checkout"],
    )


def test_setup_does_not_use_the_active_environment(checkout: Path, tmp_path: Path) -> None:
    """tools/test.sh calls tools/setup.sh, whatever is active."""
    folder = own(tmp_path / "active", None)
    before = contents(folder)
    done = subprocess.run(
        ["bash", "tools/setup.sh"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean(VIRTUAL_ENV=folder, PATH=f"{folder}/bin:{os.environ['PATH']}"),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert contents(folder) == before
