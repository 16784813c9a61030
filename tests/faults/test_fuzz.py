"""Whatever a file or an argument holds, a command does what it says, or ends with one line and exit code 2.

No traceback, no hang, no program started, and nothing written besides what the command documents.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.helpers.commands import command
from tests.helpers.damaged_files import KINDS_OF_FILES, SHARD, Kind, index_with_checksum
from tests.helpers.faults import run
from tests.helpers.good_files import ARPA, METRICS, RESULTS, Good, write_good
from tests.helpers.odd_arguments import arguments, check_arguments
from tests.helpers.odd_input import BOMB, HALF_A_PAIR, as_lines
from w2vscale.corpora.index import build_index

QUICK, LONG = 5, 30  # inputs of each kind


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return write_good(tmp_path_factory.mktemp("good"))


@contextmanager
def empty_folder() -> Iterator[Path]:
    """A new current folder."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


KINDS = {**KINDS_OF_FILES, "arguments": Kind(arguments, check_arguments)}


def fuzz(kind: Kind, good: Good, *, examples: int) -> None:
    """Check `examples` inputs, always the same ones."""

    @seed(20)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(kind.draw(good))
    def check(drawn: Any) -> None:
        with empty_folder():
            kind.check(drawn, good)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_one_line(kind: str, good: Good) -> None:
    fuzz(KINDS[kind], good, examples=QUICK)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_more_damaged_input_is_one_line(kind: str, good: Good) -> None:
    fuzz(KINDS[kind], good, examples=LONG)


def changed_cut(**changes: Any) -> Callable[[Good], bytes]:
    """A manifest of a good cut and one with changes."""
    return lambda good: as_lines(good.cuts()[0], {**good.cuts()[1], **changes})


def changed_recording(**changes: Any) -> Callable[[Good], bytes]:
    """A manifest of a good cut and one whose recording has changes."""
    return lambda good: changed_cut(recording={**good.cuts()[1]["recording"], **changes})(good)


ONCE_FAILED: list[tuple[str, Any]] = [
    ("settings file", b"[" * 99_999),
    ("settings file", b"data: {train: 2026-13-45}\n"),
    ("settings file", f"batch: {{{BOMB}, max_seconds: *a39}}".encode()),
    ("overrides", ["objective.gumbel_decay=" + "{a: " * 2000]),
    ("overrides", ["data.train=2026-13-45"]),
    ("overrides", [f"batch.max_seconds={{{BOMB}}}"]),
    ("manifest", lambda good: b"\xef\xbb\xbf" + good.bytes("cuts.jsonl")),
    ("manifest", lambda good: good.bytes("cuts.jsonl").decode().encode("utf-16")),
    ("manifest", lambda good: as_lines(good.cuts()[0]) + b"[" * 99_999),
    ("manifest", changed_cut(id=3)),
    ("manifest", changed_cut(id=HALF_A_PAIR)),
    ("manifest", changed_cut(start=5.0)),
    ("manifest", changed_cut(start=1e308)),
    ("manifest", changed_cut(duration=1e308)),
    ("manifest", changed_cut(duration=10**400)),
    ("manifest", changed_cut(duration=math.nan)),
    ("manifest", changed_cut(channel=[0])),
    ("manifest", changed_cut(channel=-1)),
    ("manifest", changed_cut(supervisions=3)),
    ("manifest", changed_cut(supervisions=[{"id": "s", "text": 3}])),
    ("manifest", changed_cut(custom=[])),
    ("manifest", changed_cut(type="MixedCut", tracks=[])),
    ("manifest", changed_recording(sampling_rate="fast")),
    ("manifest", changed_recording(num_samples=-1)),
    ("manifest", changed_recording(channel_ids=[5])),
    ("manifest", changed_recording(transforms=[{"name": "Resample", "kwargs": {}}])),
    ("index", lambda good: index_with_checksum(good, math.nan)),
    ("index", lambda good: index_with_checksum(good, math.inf)),
    ("arguments", ["train", "tiny", "data.train=cuts.jsonl", "--exp", "\udcff"]),
    ("arguments", ["train", "tiny", "data.train=cuts.jsonl", "--exp", ""]),
    ("index", b""),
    ("index", b"\x93NUMPY\x01\x00\x08\x00{'descr'"),
    ("shard", lambda good: (good.bytes(f"shards/{SHARD[0]}"), b"")),
    ("language model", ("lm.arpa", ARPA.replace("-0.3 HELLO", "x\xff HELLO").encode("latin-1"))),
    ("ids", b""),
    ("run folder", ("$\\frac$", "x.png", as_lines(*METRICS))),
    ("run folder", ("exp", "x.pgf", as_lines(*METRICS))),
    ("run folder", ("exp", "x.png", as_lines(*METRICS, {"split": "train", "update": []}))),
    ("run folder", ("exp", "x.png", as_lines(*METRICS) + b"[" * 99_999)),
    ("results", as_lines({**RESULTS, "wer": [0]})),
    ("arguments", ["data", "prepare", "folder", "folder", "new", "--segment-seconds", "1e-9"]),
    ("arguments", ["data", "prepare", "folder", "folder", "new", "--vad"]),
    ("arguments", ["data", "prepare", "mini_librispeech", "x" * 300, "new"]),
    ("arguments", ["results", "results.json", "--title", "\udcff"]),
    ("arguments", ["config", "show", "\udcff"]),
    ("arguments", ["data", "shar", "cuts.jsonl", "new%d"]),
]
"""Inputs with a traceback or a hang in an earlier version."""


@pytest.mark.parametrize("number", range(len(ONCE_FAILED)), ids=lambda n: f"{n}-{ONCE_FAILED[n][0]}")
def test_input_that_once_failed(number: int, good: Good) -> None:
    kind, case = ONCE_FAILED[number]
    with empty_folder():
        KINDS[kind].check(case(good) if callable(case) else case, good)


def test_a_damaged_list_of_bad_audio_is_one_line(good: Good, tmp_path: Path) -> None:
    cuts = good.cuts()
    cuts[1]["recording"]["sources"][0]["source"] = "/nope.flac"
    manifest = tmp_path / "cuts.jsonl"
    manifest.write_bytes(as_lines(*cuts))
    build_index(manifest)
    assert run("data", "shar", manifest, tmp_path / "shards").code == 0
    for content in (b'{"a": 1}\n', b'{"utterance": []}\n'):
        (tmp_path / "shards" / "bad_audio.000000.jsonl").write_bytes(content)
        found = run("data", "shar", manifest, tmp_path / "shards")
        assert "damaged; delete it, and the shard that it belongs to" in found.errors


def test_the_program_itself_prints_one_line(good: Good, tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_bytes(b"[" * 99_999)
    (tmp_path / "cuts.jsonl").write_bytes(changed_cut(id=3)(good))
    for words, start in (
        (["config", "show", tmp_path / "deep.yaml"], f"error: {tmp_path / 'deep.yaml'}: not valid YAML: "),
        (["data", "index", tmp_path / "cuts.jsonl"], f"error: {tmp_path / 'cuts.jsonl'}: line 2 is not a Lhotse cut"),
        (["data", "index", "\udcff"], "error: \\udcff: no such manifest"),
        (["data", "prepare", "folder", "x" * 300, tmp_path], f"error: {'x' * 300}: no such folder"),
    ):
        done = command(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(start) and done.stderr.count("\n") == 1, done.stderr
