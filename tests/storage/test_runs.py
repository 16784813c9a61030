"""The real command line with a store: kills, stop signals, a store that is away, two ranks, an empty disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import Command
from tests.helpers.stores import KEY, SECRET, environment, make_bucket, s3_server
from w2vscale.checkpoint.format import STATE, folder_name
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.remote import RemoteCheckpoints, local_model
from w2vscale.storage import objects
from w2vscale.storage.urls import Url

LARGER = ("model.dim=64", "model.ffn_dim=1024", "checkpoint.every=1", "checkpoint.keep_last=2")
"""Checkpoints of 6 MB, after each update: something is always being uploaded."""


def command(
    folder: Path, name: str, corpus: SmallCorpus, *settings: str, processes: int = 1, endpoint: str | None = None
) -> Command:
    """A run in `folder`/`name`."""
    folder.mkdir(exist_ok=True)
    arguments = ["train", "base", *MICRO_RUN, f"data.train={corpus.train}", *settings, "--exp", str(folder / name)]
    if processes > 1:
        arguments += ["--nproc-per-node", str(processes)]
    root = str(Path(__file__).resolve().parents[2])
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    variables |= environment(endpoint or os.environ["AWS_ENDPOINT_URL"])
    return Command(folder / f"{name}-{uuid4().hex[:6]}.log", *arguments, environment=variables)


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert first.state.update == second.state.update
    assert first.tensors.keys() == second.tensors.keys()
    for name in first.tensors:
        assert torch.equal(first.tensor(name), second.tensor(name)), name


def curve(exp: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (exp / "metrics.jsonl").read_text().splitlines())
    return [(line["update"], line["loss"]) for line in lines if line["split"] == "train"]


def assert_no_secrets(logs: Sequence[Path]) -> None:
    for log in logs:
        text = log.read_text(errors="replace")
        assert SECRET not in text and KEY not in text, log


def kill_in_an_upload(run: Command, store: RemoteCheckpoints, *, passed: int, delay: float) -> bool:
    """SIGKILL during an upload, `delay` seconds after its first file is there; not during the `passed` ones before.

    Returns whether the upload was unfinished.
    """
    seen: set[int] = set()
    deadline = time.monotonic() + 240.0
    while run.process.is_alive():
        assert time.monotonic() < deadline, run.output.read_text()
        begun = {update for update, files in store.files().items() if STATE not in files}
        if len(seen | begun) > passed and begun - seen:
            time.sleep(delay)
            break
        seen |= begun
    run.kill()
    run.process.join(60.0)
    assert run.process.exitcode == -signal.SIGKILL, run.output.read_text()
    return any(STATE not in files for files in store.files().values())


@pytest.mark.distributed
@pytest.mark.timeout(2400)
@pytest.mark.long
@pytest.mark.parametrize(("kills", "processes"), [(8, 1), (2, 2)])
def test_kills_in_the_middle_of_uploads(
    kills: int, processes: int, bucket: Url, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    """After each, the store has an intact newest checkpoint. At the end, the weights are those of an untouched run."""
    settings, draw = (*LARGER, f"trainer.updates={12 if processes > 1 else 40}"), random.Random(kills)
    if processes > 1:
        settings += ("engine.name=fsdp",)
    untouched = command(tmp_path, "untouched", small_corpus, *settings, processes=processes)
    store = RemoteCheckpoints(bucket / "run")
    settings += (f"checkpoint.store={store.url}",)
    untouched.finish(code=0, timeout=300.0)
    unfinished, newest, last_kill = 0, 0, 30 if processes == 1 else 8
    while unfinished < kills:
        run = command(tmp_path, "killed", small_corpus, *settings, processes=processes)
        unfinished += kill_in_an_upload(run, store, passed=1 + draw.randrange(2), delay=draw.uniform(0.0, 0.15))
        committed = store.committed()
        if committed:
            skipped: list[str] = []
            assert local_model(store.url, skipped.append).name == folder_name(committed[-1])
            assert not skipped and committed[-1] >= newest
            newest = committed[-1]
        assert committed or not newest
        if newest > last_kill:  # so that some updates are left: an older state of the store
            for update in committed[1:]:
                store.delete(update, store.files()[update])
            shutil.rmtree(tmp_path / "killed")
            newest = committed[0]
        elif draw.random() < 0.6:
            shutil.rmtree(tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed", ignore_errors=True)
    last = command(tmp_path, "killed", small_corpus, *settings, processes=processes)
    printed = last.finish(code=0, timeout=300.0)
    assert newest and f"at update {newest}\n" in printed and printed.count("downloaded ") == 1
    assert all(
        sum(name.endswith(".safetensors") for name in store.files()[update]) == processes
        for update in store.committed()
    )
    assert_same_bits(tmp_path / "killed", tmp_path / "untouched")
    assert_same_bits(local_model(store.url), tmp_path / "untouched")
    assert curve(tmp_path / "killed") == curve(tmp_path / "untouched")
    assert_no_secrets([path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"])


def wait_for(run: Command, text: str) -> None:
    deadline, printed = time.monotonic() + 120.0, ""
    while text not in printed:
        if not run.process.is_alive() or time.monotonic() > deadline:
            run.kill()
            pytest.fail(printed)
        time.sleep(0.02)
        printed = run.output.read_text() if run.output.exists() else ""


@pytest.mark.slow
def test_a_stop_signal_uploads_the_last_checkpoint(bucket: Url, small_corpus: SmallCorpus, tmp_path: Path) -> None:
    settings = (f"checkpoint.store={bucket / 'run'}", "trainer.updates=100000")
    run = command(tmp_path, "exp", small_corpus, *settings)
    wait_for(run, "update 3/")
    run.terminate()
    run.finish(code=128 + signal.SIGTERM, timeout=60.0)
    newest = open_checkpoint(tmp_path / "exp").state.update
    assert RemoteCheckpoints(bucket / "run").committed()[-1] == newest
    assert json.loads(objects.read(bucket / "run" / "owner.json", limit=10_000))["ended"]
    other = command(tmp_path / "other", "exp", small_corpus, *settings, "--resume", "never")
    assert f"{bucket}/run: holds checkpoints of an earlier run" in other.finish(code=2, timeout=60.0)


@pytest.mark.long
def test_a_store_that_is_away_at_the_end(
    bucket: Url, small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops within its grace time, and the next start uploads what is missing."""
    with s3_server(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        monkeypatch.setattr(objects, "_opened", {})
        store = make_bucket("own") / "run"
        settings = (f"checkpoint.store={store}", "checkpoint.grace_seconds=8")
        run = command(tmp_path, "exp", small_corpus, *settings, "trainer.updates=100000")
        wait_for(run, "update 2/")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            run.terminate()
            printed = run.finish(code=128 + signal.SIGTERM, timeout=60.0)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert "the last checkpoint is not in checkpoint.store yet; the next start uploads it" in printed
        update = open_checkpoint(tmp_path / "exp").state.update
        again = command(tmp_path, "exp", small_corpus, *settings, f"trainer.updates={max(update, 4)}")
        again.finish(code=0, timeout=60.0)
        assert max(update, 4) in RemoteCheckpoints(store).committed()


@pytest.mark.slow
def test_a_store_that_cannot_be_used_at_the_start(bucket: Url, small_corpus: SmallCorpus, tmp_path: Path) -> None:
    absent = command(tmp_path, "absent", small_corpus, "checkpoint.store=s3://no-such-bucket-anywhere/run")
    gone = command(
        tmp_path, "gone", small_corpus, f"checkpoint.store={bucket}/run", endpoint="http://127.0.0.1:9"
    )  # fmt: skip
    printed = absent.finish(code=2, timeout=60.0)
    (line,) = [line for line in printed.splitlines() if line.startswith("error")]
    assert line.startswith("error: s3://no-such-bucket-anywhere/run/owner.json: no such bucket")
    printed = gone.finish(code=75, timeout=60.0)
    (line,) = [line for line in printed.splitlines() if line.startswith("error")]
    assert "the store cannot be used now" in line
    assert_no_secrets([*tmp_path.rglob("*.log")])
