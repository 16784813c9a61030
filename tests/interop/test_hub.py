"""Exports arrive at a stub of the Hugging Face Hub byte by byte; failures say what is wrong and how to continue."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.exported import random_model, save_model
from tests.helpers.hub import TOKEN, Hub, hub_stub
from tests.helpers.micro import SMALL
from tests.helpers.stores import free_port
from w2vscale.checkpoint.format import TrainState
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.interop import hub as hub_module
from w2vscale.interop.hub import push_to_hub

constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config("base", [*SMALL, "model.layers=1"])
    folder = tmp_path_factory.mktemp("run")
    return save_model(folder, config, random_model(config, seed=3).state_dict(), TrainState(update=7))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stub that this process uses as the Hub."""
    with hub_stub() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not that of the stub
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export that can be uploaded."""
    path = tmp_path / "my export"
    path.mkdir()
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_export_and_upload(checkpoint: Path, tmp_path: Path) -> None:
    """The real command, with the settings that users have: HF_ENDPOINT and HF_TOKEN."""
    root = str(Path(__file__).resolve().parents[2])
    with hub_stub() as hub:
        given = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        command = ["export", str(checkpoint), str(tmp_path / "out"), "--license", "apache-2.0"]
        done = subprocess.run(
            [sys.executable, "-m", "w2vscale", *command, "--push-to-hub", "org/model", "--private"],
            env=os.environ | given | {"PYTHONPATH": root, "COLUMNS": "200"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"uploaded: {hub.endpoint}/org/model" in done.stdout
        assert hub.files == {"org/model": contents(tmp_path / "out")}
        assert hub.private == {"org/model": True}
        assert len(hub.uploaded) == 1, "the weights go through LFS"
    assert b"license: apache-2.0\n" in hub.files["org/model"]["README.md"]


def test_a_repository_that_exists_gets_the_new_files(hub: Hub, folder: Path) -> None:
    for text in ("---\nlicense: mit\n---\n", "---\nlicense: other\n---\n"):
        (folder / "README.md").write_text(text)
        assert push_to_hub(folder, "org/model", private=False) == f"{hub.endpoint}/org/model"
        assert hub.files == {"org/model": contents(folder)}


def refusal(folder: Path, name: str = "org/model", *, private: bool = False) -> str:
    """The error of an upload. The folder stays as it is."""
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        push_to_hub(folder, name, private=private)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message
    assert contents(folder) == before
    return message


def test_refusals_say_why_and_how_to_repeat_the_upload(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(folder, "strangers/model", private=True)
    assert message == (
        f"strangers/model: cannot be uploaded to {hub.endpoint}: 403: the token has no permission to write there; make "
        f"one that has at https://huggingface.co/settings/tokens; {folder} is complete, upload it with: "
        f"hf upload strangers/model '{folder}' . --private"
    )
    (folder / "README.md").write_text("---\nlicense: free\n---\n")
    assert '"license" must be one of [apache-2.0, mit, other]' in refusal(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "401: the token is not valid; log in with: hf auth login, or set HF_TOKEN" in refusal(folder)
    assert hub.files == {"org/model": {}}


def test_a_public_repository_gets_no_private_files(hub: Hub, folder: Path) -> None:
    hub.files["org/model"], hub.private["org/model"] = {"old": b""}, False
    message = refusal(folder, private=True)
    assert message.startswith("org/model: is a public repository, and --private was given; nothing was uploaded.")
    assert hub.files == {"org/model": {"old": b""}} and not hub.uploaded
    hub.private["org/model"] = True
    push_to_hub(folder, "org/model", private=True)
    assert hub.files["org/model"].items() >= contents(folder).items()


def test_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "Connection refused" in refusal(folder)


def test_a_hub_that_says_nothing_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections, and never answers."""
    monkeypatch.setattr(hub_module, "SILENCE", 0.5)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert "is complete, upload it with: hf upload" in refusal(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push-to-hub", "org/a model"], "--push-to-hub org/a model: not the name of a repository (USER/NAME): "),
        (["--push-to-hub", "org/model"], "--push-to-hub org/model: no token of the Hugging Face Hub; log in with: hf"),
        (["--push-to-hub", "org/model", "--format", "fairseq2"], "--push-to-hub: --format fairseq2 has no model card"),
        (["--private"], "--private: only applies to --push-to-hub"),
    ],
)
def test_what_is_known_before_is_refused_before_the_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "out"), *arguments])
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()
