"""Any content in any file of a run folder: every command ends with one line, or works. No traceback, nothing new."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.helpers.audio import SmallCorpus
from tests.helpers.checkpoints import seal
from tests.helpers.faults import in_time
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.format import committed
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.corpora.index import build_index
from w2vscale.errors import UserError
from w2vscale.training.train import train

FILES = (
    "config.yaml", "metrics.jsonl", "lock", "logs/bad_audio.jsonl", "calibration.json",
    "evaluation.json", "errors.json",
    "checkpoints/update_00000002/train_state.json", "checkpoints/update_00000002/config.yaml",
    "checkpoints/update_00000002/shard-00001-model-00001-of-00001.safetensors",
)  # fmt: skip
COMMANDS = (
    "train", "checkpoint show {exp}", "checkpoint verify {exp}", "checkpoint average {exp} {out} --last 1",
    "checkpoint consolidate {exp} {out}", "report {exp} --output {out}/report.html", "config show {exp}",
    "export {exp} {out} --format huggingface", "replay {file}",
    "results {exp}/evaluation.json {exp}/errors.json --output {out}/RESULTS.md",
)  # fmt: skip

KEYS = (
    "update", "audio_seconds", "skipped_updates", "skipped_windows", "data", "ranks", "hours_seen", "wer", "table",
    "utterances", "split", "files", "format", "validation", "utterance", "loss", "model", "pid",
)  # fmt: skip
EDITS = {"substitutions": 1, "deletions": 0, "insertions": 0, "reference": 10}
RATES = {
    "wer": 0.1, "cer": 0.1, "word_interval": [0.0, 0.2], "character_interval": [0.0, 0.2], "cuts": ["c"],
    "decoding": "greedy", "utterances": [{"utterance": "a", "words": EDITS, "characters": EDITS}],
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


def _without(document: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != key}


def _sealed(old: bytes, key: str, value: Any) -> bytes:
    """A train_state.json with another value, and with the checksum of its new content."""
    try:
        document = json.loads(old)
        del document["sha256"]
    except (ValueError, KeyError, TypeError):
        return old
    document = {**document, key: value}
    checksum = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return json.dumps({**document, "sha256": checksum}).encode()


@st.composite
def changes(draw: st.DrawFn) -> Any:
    """A function that changes the content of a file."""
    kind = draw(st.sampled_from(["bytes", "flip", "cut", "json", "value", "deep", "sealed", "sealed"]))
    if kind == "bytes":
        new = draw(st.binary(max_size=64))
        return lambda old: new
    if kind == "flip":
        place, mask = draw(st.floats(0, 1)), draw(st.integers(1, 255))

        def flip(old: bytes) -> bytes:
            at = int(place * (len(old) - 1)) if old else 0
            return old[:at] + bytes([old[at] ^ mask]) + old[at + 1 :] if old else b"x"

        return flip
    if kind == "cut":
        share = draw(st.floats(0, 1))
        return lambda old: old[: int(share * len(old))]
    if kind == "deep":
        mark = draw(st.sampled_from(["[", '{"a":', "- "]))
        return lambda old: (mark * 20_000).encode()
    value = draw(JSON)
    if kind == "json":
        return lambda old: json.dumps(value).encode("utf-8", "surrogatepass")
    key = draw(st.sampled_from(KEYS))
    if kind == "sealed":
        return lambda old: _sealed(old, key, value)

    def replace(old: bytes) -> bytes:
        lines = []
        for line in old.decode(errors="replace").splitlines():
            try:
                document = json.loads(line)
                if isinstance(document, dict):
                    document = {**document, key: value} if value is not None else _without(document, key)
                lines.append(json.dumps(document))
            except ValueError:
                lines.append(f"{key}: {json.dumps(value)}" if line.startswith(f"{key}:") else line)
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    return replace


@pytest.fixture(scope="module")
def finished(small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    exp = tmp_path_factory.mktemp("finished") / "exp"
    assert train(_config(small_corpus), exp) == 0
    (exp / "logs" / "bad_audio.jsonl").write_text(
        json.dumps({"utterance": "a", "file": "b", "kind": "missing", "reason": "c", "left_out": True}) + "\n"
    )
    (exp / "calibration.json").write_text("{}")
    (exp / "evaluation.json").write_text(json.dumps({"update": 2, "utterances": 3.0, "table": {"loss": "2 nats"}}))
    (exp / "errors.json").write_text(json.dumps(RATES))
    return exp


def _config(corpus: SmallCorpus, *more: str) -> Any:
    two = ("trainer.updates=2", "schedule.warmup_updates=1", "checkpoint.every=1")
    return load_config("base", [*MICRO_RUN, *two, f"data.train={corpus.train}", *more])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def _check(finished: Path, work: Path, corpus: SmallCorpus, file: str, change: Any, command: str) -> None:
    shutil.rmtree(work)
    exp, out = Path(shutil.copytree(finished, work / "exp", symlinks=True)), work / "out"
    path = exp / file
    old = path.read_bytes() if path.is_file() else b""
    path.write_bytes(change(old))
    before = sorted(os.listdir(work))
    try:
        if command == "train":
            train(_config(corpus), exp)
        else:
            arguments = [part.format(exp=exp, out=out, file=path) for part in command.split()]
            app(args=arguments, standalone_mode=False)
        return
    except UserError as caught:
        error = str(caught)
    assert "\n" not in error
    assert not [*out.rglob("*.safetensors")]
    assert sorted(os.listdir(work)) in (before, sorted([*before, "out"]))


@pytest.mark.parametrize("file", ["lock", "metrics.jsonl", "logs/bad_audio.jsonl", "config.yaml"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/full")])
def test_what_is_not_a_file_is_no_hang(
    finished: Path, work: Path, small_corpus: SmallCorpus, file: str, make: Callable[[Path], None]
) -> None:
    shutil.rmtree(work)
    exp = Path(shutil.copytree(finished, work / "exp", symlinks=True))
    (exp / file).unlink(missing_ok=True)
    make(exp / file)
    for command in (
        lambda: train(_config(small_corpus, "trainer.updates=3"), exp),
        lambda: app(args=["report", str(exp), "--output", str(work / "x.png")], standalone_mode=False),
    ):
        error = ""
        try:
            with in_time(60.0):
                command()
        except UserError as caught:
            error = str(caught)
        assert "\n" not in error


@pytest.mark.parametrize("file", ["metrics.jsonl", "logs/bad_audio.jsonl", "config.yaml", "run.sh", "lock"])
def test_nothing_is_written_through_a_link(
    finished: Path, work: Path, small_corpus: SmallCorpus, tmp_path: Path, file: str
) -> None:
    """A run folder from a stranger may hold links to files of the user."""
    lines = small_corpus.train.read_text().splitlines()
    missing = {**json.loads(lines[0]), "id": "missing"}
    missing["recording"]["sources"][0]["source"] = "/nope.flac"
    corpus = tmp_path / "cuts.jsonl"
    corpus.write_text("\n".join([*lines, json.dumps(missing)]) + "\n")
    build_index(corpus)
    for target in (tmp_path / "precious", tmp_path / "new"):
        shutil.rmtree(work)
        exp = Path(shutil.copytree(finished, work / "exp", symlinks=True))
        (exp / file).unlink(missing_ok=True)
        (exp / file).symlink_to(target)
        (tmp_path / "precious").write_text("do not touch me\n")
        with suppress(UserError):
            config = _config(small_corpus, f"data.train={corpus}", "trainer.updates=12", "data.max_bad_fraction=1")
            train(config, exp, command=["train"])
        assert (tmp_path / "precious").read_text() == "do not touch me\n"
        assert not (tmp_path / "new").exists()


def test_a_section_without_settings_in_a_checkpoint(finished: Path, work: Path, small_corpus: SmallCorpus) -> None:
    shutil.rmtree(work)
    exp = Path(shutil.copytree(finished, work / "exp", symlinks=True))
    newest = committed(exp / "checkpoints")[-1]
    settings = yaml.safe_load((newest / "config.yaml").read_text())
    (newest / "config.yaml").write_text(yaml.safe_dump({**settings, "mix": None}))
    seal(newest)
    assert train(_config(small_corpus, "trainer.updates=3"), exp) == 0


@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_any_content_of_any_file(finished: Path, work: Path, small_corpus: SmallCorpus, examples: int) -> None:
    @seed(21)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(file=st.sampled_from(FILES), change=changes(), command=st.sampled_from(COMMANDS))
    def check(file: str, change: Any, command: str) -> None:
        _check(finished, work, small_corpus, file, change, command)

    check()
