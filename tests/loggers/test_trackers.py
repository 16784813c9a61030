"""Weights & Biases and MLflow: their own libraries read back every row once, after a kill and a resume."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.helpers.logged import (
    UPDATES,
    expected,
    in_a_process,
    in_mlflow,
    in_wandb,
    opened,
    state,
)
from tests.helpers.processes import FORKS
from w2vscale.errors import UserError
from w2vscale.loggers.base import RunFacts
from w2vscale.loggers.identity import identity
from w2vscale.loggers.mlflow import MlflowService, create_database, sqlite_file, tracking_uri
from w2vscale.loggers.tags import Tags


def of(kind: str, exp: Path) -> str:
    return "logging.wandb=project" if kind == "wandb" else f"logging.mlflow={exp / 'mlflow'}"


def found(kind: str, exp: Path) -> Counter[tuple[str, str, int]]:
    """What a service has of the only run."""
    if kind == "wandb":
        (rows,) = in_wandb(exp).values()
        return rows
    ((rows, facts),) = in_mlflow(exp / "mlflow").values()
    assert facts["optim.lr"] == "0.001" and facts["status"] == "FINISHED"
    return rows


def wanted(kind: str) -> Counter[tuple[str, str, int]]:
    return expected(histograms=kind == "wandb")  # MLflow has none


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_everything_is_there(tmp_path: Path, kind: str) -> None:
    in_a_process(tmp_path, (of(kind, tmp_path),), 0, UPDATES)
    assert found(kind, tmp_path) == wanted(kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
@pytest.mark.parametrize(
    "parts", [[(0, 7), (6, UPDATES)], [(0, 9), (4, 6), (4, UPDATES)], [(0, 2), (0, UPDATES)]], ids=str
)
def test_a_killed_run_has_no_duplicates_and_no_gaps(tmp_path: Path, kind: str, parts: list[tuple[int, int]]) -> None:
    for number, (first, last) in enumerate(parts, start=1):
        in_a_process(tmp_path, (of(kind, tmp_path),), first, last, killed=number < len(parts))
    assert found(kind, tmp_path) == wanted(kind)


def test_a_run_of_a_sweep_has_the_id_that_its_agent_gives(tmp_path: Path) -> None:
    for first, last in ((0, 7), (6, UPDATES)):
        in_a_process(
            tmp_path, (of("wandb", tmp_path),), first, last, WANDB_SWEEP_ID="sweep", WANDB_RUN_ID="of-the-agent"
        )
    assert in_wandb(tmp_path) == {"of-the-agent": wanted("wandb")}


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("", "logging.wandb=project: no key for https://"),
        ("loud", "logging.wandb=project: wandb refuses its settings: "),
    ],
)
def test_wandb_without_a_key_or_with_a_wrong_mode_is_one_line(tmp_path: Path, mode: str, message: str) -> None:
    code = (
        "from tests.helpers.logged import opened\nfrom pathlib import Path\nfrom w2vscale.errors import UserError\n"
        "try: opened(Path('run'), 'logging.wandb=project')\n"
        "except UserError as error: print('UserError', error)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"WANDB_MODE": mode} if mode else {}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
    )
    assert done.stdout.startswith(f"UserError {message}"), done
    assert ("WANDB_MODE=offline" in done.stdout or mode) and done.stdout.count("\n") == 1


@pytest.mark.parametrize(("package", "setting"), [("wandb", "wandb=project"), ("mlflow", "mlflow=runs")])
def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, setting: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed: pip install 'w2vscale\[{package}\]'"):
        opened(tmp_path, f"logging.{setting}")


def test_the_places_of_mlflow(tmp_path: Path) -> None:
    assert tracking_uri("http://localhost:5000") == ("http://localhost:5000", None)
    assert tracking_uri("databricks") == ("databricks", None)
    assert tracking_uri(str(tmp_path)) == (f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts")
    with pytest.raises(UserError, match=r"logging\.mlflow=ftp://host/x: not a folder"):
        tracking_uri("ftp://host/x")


@pytest.mark.long
def test_a_server_that_does_not_answer_does_not_hold_the_run_up(tmp_path: Path) -> None:
    """A run of W&B whose server accepts connections and then says nothing."""
    code = (
        "import socket\nfrom tests.helpers.logged import opened, log_updates\nfrom pathlib import Path\n"
        "from w2vscale.loggers import remote\nremote.END_OF_RUN = 1.0\n"
        "server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen()\n"
        "import os; os.environ['WANDB_BASE_URL'] = f'http://127.0.0.1:{server.getsockname()[1]}'\n"
        "loggers = opened(Path('run'), 'logging.wandb=project')\n"
        "log_updates(loggers, range(1, 13)); loggers.finish(); loggers.close()\n"
    )
    environment = {**os.environ, "WANDB_API_KEY": "local-" + 40 * "0", "PYTHONPATH": os.getcwd()}
    environment.pop("WANDB_MODE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("logging.wandb=project: not everything was delivered within 1 s") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 15


@pytest.mark.long
def test_a_kill_while_a_database_is_made_leaves_none_or_a_complete_one(tmp_path: Path) -> None:
    """MLflow takes seconds to make one in place, and could not open it afterwards."""
    for number in range(8):
        path = tmp_path / str(number) / "mlflow.db"
        path.parent.mkdir()
        process = FORKS.Process(target=create_database, args=(path,))
        process.start()
        deadline = time.monotonic() + 60
        while not list(path.parent.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.05 * number)
        process.kill()
        process.join()
        if not path.exists():
            create_database(path)
        client = MlflowClient(tracking_uri=f"sqlite:///{path}")
        assert client.get_experiment(client.create_experiment("another")).name == "another"


def test_a_run_of_mlflow_that_a_kill_left_without_parameters_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    levels = {name: logging.getLogger(name).level for name in ("mlflow.store.db.utils", "alembic")}
    service = MlflowService(str(tmp_path / "mlflow"), RunFacts(tmp_path, {"optim": {"lr": 0.001}}, Tags([])))
    who = identity(tmp_path, {}, state(0))
    with monkeypatch.context() as patched:
        patched.setattr(MlflowService, "_log_parameters", None)
        with pytest.raises(TypeError):  # in place of a kill
            service.open(who)
    assert "optim.lr" not in in_mlflow(tmp_path / "mlflow")[who.id][1]
    service.open(who)
    service.open(who)
    assert in_mlflow(tmp_path / "mlflow")[who.id][1]["optim.lr"] == "0.001"
    # In a process where MLflow has made no database before, it would have announced each step.
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert "INFO" not in capfd.readouterr().err


def test_a_database_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"of another run")
    create_database(path)
    assert path.read_bytes() == b"of another run" and [path] == list(tmp_path.iterdir())
    assert sqlite_file(f"sqlite:///{path}") == path and sqlite_file("http://host") is None
