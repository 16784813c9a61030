"""Whatever a file or an argument holds, a command does what it says, or ends with one line and exit code 2.

No traceback, no hang, no program started, and nothing written besides what the command documents.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from typer.main import get_command

from tests.helpers.audio import FORMATS, cut_of, noise, write_manifest
from tests.helpers.commands import command
from tests.helpers.faults import Outcome, in_time, no_programs, run
from tests.helpers.micro import MICRO_ENCODER, MICRO_MODEL, MICRO_TRAINING
from tests.helpers.odd_input import (
    BOMB,
    HALF_A_PAIR,
    ODD_BYTES,
    ODD_NUMBERS,
    as_lines,
    bytes_like,
    documents_like,
    odd_values,
)
from w2vscale.cli.app import app
from w2vscale.config import dump_config, load_config
from w2vscale.corpora.index import build_index
from w2vscale.corpora.shar import write_shards
from w2vscale.data.assembly import Assembler
from w2vscale.data.audio import AudioError
from w2vscale.data.manifest import Corpus
from w2vscale.data.stream import StreamedMicroBatches
from w2vscale.errors import UserError
from w2vscale.inference.decoding import BeamSearch, build_decoder
from w2vscale.inference.utterances import find_utterances
from w2vscale.objectives import all_settings, build_objective
from w2vscale.objectives.ctc import LETTERS
from w2vscale.training.loop import train

QUICK, LONG = 5, 140  # inputs of each kind

# Good files, of which the damaged ones are made.

AUDIO_FORMATS = {**FORMATS, ".sph": ("NIST", "PCM_16")}
TEXTS = ("HELLO WORLD AND ALL", "THE QUICK BROWN FOX", "JUMPS OVER THE LAZY DOG")
ARPA = r"""\data\
ngram 1=5
ngram 2=2

\1-grams:
-1.0 <unk>
-99 <s> -0.3
-1.0 </s>
-0.7 HELLO -0.3
-0.7 WORLD -0.3

\2-grams:
-0.3 <s> HELLO
-0.3 HELLO WORLD

\end\
"""
VALUES = {"hours_seen": 0.1, "loss": 1.5, "accuracy": 0.3, "grad_norm": 2.0, "code_perplexity": 9.0}
METRICS = [{"split": split, "update": update, **VALUES} for update in (1, 2) for split in ("train", "validation")]
COUNTS = {"reference": 5, "substitutions": 1, "deletions": 0, "insertions": 0}
RESULTS = {
    "wer": 0.2,
    "cer": 0.1,
    "word_interval": [0.1, 0.3],
    "character_interval": [0.0, 0.2],
    "cuts": ["a"],
    "decoding": "greedy",
    "utterances": [{"utterance": "u", "words": COUNTS, "characters": COUNTS}],
}
MICRO_CTC = (*MICRO_ENCODER, "objective.freeze_encoder_updates=0", "regularization.feature_grad_mult=1")


class Good(NamedTuple):
    """A folder of good files."""

    folder: Path

    def bytes(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def cuts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.bytes("cuts.jsonl").splitlines()]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """Audio in all formats, manifests, shards, models for text, metrics, and runs of both objectives."""
    import matplotlib.font_manager  # noqa: F401 - its first import on a machine starts a program that lists the fonts

    folder = tmp_path_factory.mktemp("good")
    cuts = []
    for number, (suffix, (kind, subtype)) in enumerate(AUDIO_FORMATS.items()):
        path = folder / f"u{number}{suffix}"
        soundfile.write(path, noise(1.0, seed=number), 16_000, format=kind, subtype=subtype)
        if suffix != ".sph":
            cuts.append(cut_of(path))
    write_manifest(folder / "cuts.jsonl", cuts)
    texts = [_with_text(cut.to_dict(), text, f"{cut.id}-{n}") for cut in cuts for n, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_bytes(as_lines(*texts))
    build_index(folder / "texts.jsonl")
    write_shards(folder / "cuts.jsonl", folder / "shards", shard_size=3)
    settings = ["data.min_seconds=0.3", "batch.max_seconds=20"]
    (folder / "config.yaml").write_text(dump_config(load_config("tiny", settings)))
    (folder / "letters.txt").write_text("\n".join(LETTERS))
    (folder / "words.txt").write_text("HELLO\nWORLD W O R L D |\n")
    (folder / "lm.arpa").write_text(ARPA)
    (folder / "metrics.jsonl").write_bytes(as_lines(*METRICS))
    (folder / "results.json").write_bytes(as_lines(RESULTS))
    run("data", "pieces", folder / "texts.jsonl", "-o", folder / "pieces.model", "--size", 30)
    for name, preset, more in (("exp", "base", MICRO_MODEL), ("ctc", "ctc_1h", MICRO_CTC)):
        settings = [*MICRO_TRAINING, *more, f"data.train={folder / 'texts.jsonl'}", "data.min_seconds=0.3"]
        train(load_config(preset, [*settings, "trainer.updates=5"]), folder / name)
    return Good(folder)


def _with_text(cut: dict[str, Any], text: str, identifier: str) -> dict[str, Any]:
    segment = {"id": "s", "recording_id": cut["id"], "start": 0.0, "duration": 1.0, "channel": 0}
    return cut | {"id": identifier, "supervisions": [{**segment, "text": text, "speaker": "a"}]}


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


def assert_wrote(found: Outcome, *names: str, always: tuple[str, ...] = ()) -> None:
    """A command wrote only files (or into folders) that it documents, and only `always` if it refused its input."""
    allowed = {*always, *(() if found.code else names)}
    assert [file for file in found.new_files if file.split("/")[0] not in allowed] == [], found


# Each kind of input: how to draw one, and how to give it to commands.


def settings_files(good: Good) -> SearchStrategy[bytes]:
    document = yaml.safe_load(good.bytes("config.yaml"))
    dumped = documents_like(document).map(lambda found: yaml.dump(found).encode())
    return dumped | documents_like(document).map(as_lines) | bytes_like(good.bytes("config.yaml"), 4000)


def check_settings(content: bytes, good: Good) -> None:
    Path("mine.yaml").write_bytes(content)
    assert_wrote(run("config", "show", "mine.yaml"))
    assert_wrote(run("config", "diff", "tiny", "mine.yaml"))
    assert_wrote(run("data", "stats", good.folder / "cuts.jsonl", "--config", "mine.yaml"))


KEYS = [row[0] for rows in all_settings().values() for row in rows]
ODD_YAML = [
    "[" * 9999,
    "{a: " * 2000,
    "!!python/object/apply:os.system [touch marker]",
    "&a [*a]",
    "2026-13-45",
    "0x1F",
    "@",
]


def overrides(good: Good) -> SearchStrategy[list[str]]:
    key = st.sampled_from([*KEYS, "", ".", "a", "data", "data.", "objective.name.x"]) | st.text(max_size=10)
    dumped = odd_values.map(lambda value: yaml.dump(value, default_flow_style=True))
    value = dumped | st.text(max_size=20) | st.sampled_from(ODD_YAML)
    return st.lists(st.builds("{}={}".format, key, value) | st.text(max_size=9), max_size=3)


def check_overrides(words: list[str], good: Good) -> None:
    assert_wrote(run("config", "show", "tiny", "--", *words))


def manifests(good: Good) -> SearchStrategy[bytes]:
    cuts = st.sampled_from(good.cuts())
    lines = cuts.flatmap(documents_like).map(as_lines) | cuts.map(as_lines) | st.sampled_from(ODD_BYTES)
    return st.lists(lines, min_size=1, max_size=4).map(b"".join) | bytes_like(good.bytes("cuts.jsonl"), 10**6)


LISTING, INDEX = "cuts.jsonl.bad_audio", "cuts.jsonl.index.npy"


def check_manifest(content: bytes, good: Good) -> None:
    Path("cuts.jsonl").write_bytes(content)
    assert_wrote(run("data", "index", "cuts.jsonl"), INDEX)
    assert_wrote(run("data", "validate", "cuts.jsonl"), always=(LISTING, INDEX))
    assert_wrote(run("data", "validate", "cuts.jsonl", "--audio", "-j", 1), always=(LISTING, INDEX))
    check_indexed_manifest()


def check_indexed_manifest() -> None:
    """Commands that read an index."""
    assert_wrote(run("data", "stats", "cuts.jsonl", "--config", "tiny", "--set", "data.min_seconds=0.2"))
    found = run("data", "subset", "cuts.jsonl", "out.jsonl", "--hours", 0.0005)
    assert_wrote(found, "out.jsonl", "out.jsonl.index.npy")
    assert_wrote(run("data", "shar", "cuts.jsonl", "shards"), always=("shards",))
    assert_wrote(run("data", "pieces", "cuts.jsonl", "-o", "x.model", "--size", 9), "x.model", always=(INDEX,))


def index_files(good: Good) -> SearchStrategy[bytes]:
    records = np.load(good.folder / INDEX)

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        found, buffer = records.copy(), io.BytesIO()
        for _ in range(draw(st.integers(1, 3))):
            name, value = draw(st.sampled_from(["offset", "duration", "language"])), draw(st.sampled_from(ODD_NUMBERS))
            with suppress(OverflowError, ValueError):
                found[name][draw(st.integers(0, found.size - 1))] = value
        np.save(buffer, found[: draw(st.integers(0, 2 * found.size))])
        return buffer.getvalue()

    return bytes_like(good.bytes(INDEX), 128) | changed()


def index_with_checksum(good: Good, value: float) -> bytes:
    records, buffer = np.load(good.folder / INDEX), io.BytesIO()
    records["duration"][-1] = value
    np.save(buffer, records)
    return buffer.getvalue()


def check_index(content: bytes, good: Good) -> None:
    shutil.copy(good.folder / "cuts.jsonl", ".")
    Path(INDEX).write_bytes(content)
    assert_wrote(run("data", "validate", "cuts.jsonl"), always=(LISTING,))
    Path(INDEX).write_bytes(content)
    with suppress(UserError):
        assert Corpus([Path("cuts.jsonl")]).fingerprint  # what a run reads of it at its start
    check_indexed_manifest()
    assert_wrote(run("data", "index", "cuts.jsonl"))


def audio_files(good: Good) -> SearchStrategy[tuple[str, bytes]]:
    files = [(suffix, good.bytes(f"u{number}{suffix}")) for number, suffix in enumerate(AUDIO_FORMATS)]
    return st.sampled_from(files).flatmap(lambda file: st.tuples(st.just(file[0]), bytes_like(file[1], 100)))


def check_audio(file: tuple[str, bytes], good: Good) -> None:
    path = Path(f"audio/a{file[0]}")
    path.parent.mkdir()
    path.write_bytes(file[1])
    cut = good.cuts()[0]
    cut["recording"]["sources"][0]["source"] = str(path)
    Path("cuts.jsonl").write_bytes(as_lines(cut))
    assert_wrote(run("data", "validate", "cuts.jsonl", "--audio", "-j", 1), always=(LISTING, INDEX))
    prepared = run("data", "prepare", "folder", "audio", "out")
    assert_wrote(prepared, always=("out",))  # the headers that were read are kept
    if not prepared.code:
        run("data", "validate", "out/cuts_train.jsonl", "--audio", "-j", 1)
    with in_time(), no_programs(), suppress(AudioError):
        (utterance,) = find_utterances(path)
        assert all(block.ndim == 1 for block in utterance.open().blocks())


def shards(good: Good) -> SearchStrategy[tuple[bytes, bytes]]:
    packed, archive = (good.bytes(f"shards/{name}") for name in SHARD)
    lines = gzip.decompress(packed)
    cut = st.sampled_from([json.loads(line) for line in lines.splitlines()]).flatmap(documents_like)
    texts = bytes_like(lines) | st.lists(cut, min_size=1, max_size=3).map(lambda cuts: as_lines(*cuts))

    @st.composite
    def described(draw: st.DrawFn) -> bytes:
        """The archive with other JSON beside the audio."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(archive)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
            for member in old:
                stored = old.extractfile(member)
                assert stored is not None
                content = stored.read()
                if member.name.endswith(".json"):
                    content = as_lines(draw(documents_like(json.loads(content))))
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    return st.tuples(texts.map(gzip.compress) | bytes_like(packed, 40), st.just(archive)) | st.tuples(
        st.just(packed), described() | bytes_like(archive, 1100)
    )


SHARD = ("cuts.000000.jsonl.gz", "recording.000000.tar")


def check_shard(files: tuple[bytes, bytes], good: Good) -> None:
    for name, content in zip(SHARD, files, strict=True):
        Path(name).write_bytes(content)
        shutil.copy(good.folder / "shards" / name.replace("000000", "000001"), ".")
    settings = [
        "data.mode=stream",
        "data.max_seconds=2",
        "data.min_seconds=0.3",
        "data.workers=0",
        "data.stream_buffer=100",
    ]
    config = load_config("tiny", [*settings, "batch.max_seconds=4"])
    data = config.data.model_copy(update={"train": [Path()]})
    assemble = Assembler(build_objective(config), config.model, seed=0)
    with in_time(), no_programs(), suppress(UserError):
        stream = StreamedMicroBatches(assemble, model=config.model, data=data, batch=config.batch)
        for window in stream.windows(range(2), micro_batches=2, rank=0, world_size=1):
            assert all("\n" not in bad.reason for batch in window for bad in batch.bad)


def transcripts(good: Good) -> SearchStrategy[bytes]:
    utf16 = st.text(max_size=40).map(lambda text: text.encode("utf-16"))
    return st.binary(max_size=40) | utf16 | bytes_like(b"HELLO WORLD\n")


def check_transcript(content: bytes, good: Good) -> None:
    Path("audio").mkdir()
    shutil.copy(good.folder / "u0.wav", "audio/a.wav")
    Path("audio/a.txt").write_bytes(content)
    assert_wrote(run("data", "prepare", "folder", "audio", "out"), "out")
    run("data", "validate", "out/cuts_train.jsonl")
    run("data", "pieces", "out/cuts_train.jsonl", "-o", "x.model", "--size", 9)


def vocabularies(good: Good) -> SearchStrategy[bytes]:
    return bytes_like(good.bytes("letters.txt")) | st.binary(max_size=30)


def check_vocabulary(content: bytes, good: Good) -> None:
    Path("letters.txt").write_bytes(content)
    assert_wrote(run("config", "show", "ctc_1h", "objective.vocabulary=letters.txt"))


def piece_models(good: Good) -> SearchStrategy[bytes]:
    return bytes_like(good.bytes("pieces.model"), 2000) | st.binary(max_size=40)


def check_pieces(content: bytes, good: Good) -> None:
    Path("x.model").write_bytes(content)
    assert_wrote(run("config", "show", "ctc_1h", "objective.vocabulary=[]", "objective.sentencepiece=x.model"))


def language_models(good: Good) -> SearchStrategy[tuple[str, bytes]]:
    arpa = good.bytes("lm.arpa")
    texts = bytes_like(arpa) | st.binary(max_size=40)
    packed = texts.map(gzip.compress) | bytes_like(gzip.compress(arpa), 30)
    words = bytes_like(good.bytes("words.txt")) | st.binary(max_size=30)
    kinds = {"lm.arpa": texts, "lm.arpa.gz": packed, "words.txt": words}
    return st.one_of([st.tuples(st.just(name), content) for name, content in kinds.items()])


def check_language_model(file: tuple[str, bytes], good: Good) -> None:
    path = Path(file[0])
    path.write_bytes(file[1])
    with in_time(), no_programs(), suppress(UserError):
        build_decoder(LETTERS, BeamSearch(lexicon=path) if path.suffix == ".txt" else BeamSearch(lm=path))


def identifiers(good: Good) -> SearchStrategy[bytes]:
    return st.binary(max_size=30) | bytes_like(b"u0\nu1\n")


def check_identifiers(content: bytes, good: Good) -> None:
    for name in ("cuts.jsonl", INDEX):
        shutil.copy(good.folder / name, ".")
    Path("ids").write_bytes(content)
    found = run("data", "subset", "cuts.jsonl", "out.jsonl", "--ids", "ids")
    assert_wrote(found, "out.jsonl", "out.jsonl.index.npy")


def run_folders(good: Good) -> SearchStrategy[tuple[str, str, bytes]]:
    lines = st.lists(st.sampled_from(METRICS).flatmap(documents_like), max_size=4).map(lambda each: as_lines(*each))
    names, pictures = ["exp", "a$\\frac$b", "$", "ä\n"], ["x.png", "x.svg", "x.nope", "x.pgf", "x"]
    content = bytes_like(good.bytes("metrics.jsonl")) | lines
    return st.tuples(st.sampled_from(names), st.sampled_from(pictures), content)


def check_run_folder(case: tuple[str, str, bytes], good: Good) -> None:
    exp, picture, metrics = case
    Path(exp).mkdir()
    (Path(exp) / "metrics.jsonl").write_bytes(metrics)
    shutil.copy(good.folder / "config.yaml", exp)
    assert_wrote(run("report", exp, "-o", picture), picture)


def results_files(good: Good) -> SearchStrategy[bytes]:
    return bytes_like(good.bytes("results.json")) | documents_like(RESULTS).map(as_lines)


def check_results(content: bytes, good: Good) -> None:
    for name, text in (("a", content), ("a_scratch", good.bytes("results.json"))):
        Path(name).mkdir()
        (Path(name) / "results.json").write_bytes(text)
    assert_wrote(run("results", "a/results.json", "a_scratch/results.json"), "RESULTS.md")


# The commands with words that are mostly usual, so that many do their work.

FILES = (
    *("cuts.jsonl", "texts.jsonl", "u0.wav", "config.yaml", "lm.arpa", "words.txt", "letters.txt", "pieces.model"),
    *("results.json", "metrics.jsonl", "exp", "ctc", "shards"),
)
ODD_WORDS = (
    *(".", "..", "/dev/null", "/nope/x", "loop", "empty", "empty/a", "new/deep", "a.pgf", "-", "--", "", "\udcff"),
    *("0", "-1", "3", "2.5", "1e-9", "1e308", "nan", "inf", "-inf", "9" * 20, "true", "tiny", "base", "ctc_1h"),
    *("data.train=u0.wav", "data.train=shards", "data.mode=stream", "trainer.init_from=empty", "x" * 300, "a=b"),
    *("trainer.updates=\udcff", "trainer.init_from=exp", "objective.name=ctc", "batch.max_seconds=2", "torchaudio"),
)
USUAL = {
    name: words
    for names, words in {
        "manifest manifests cuts train test": ("cuts.jsonl", "texts.jsonl"),
        "checkpoint path run exps": ("exp", "ctc", "exp/checkpoints/latest"),
        "source one other config": ("tiny", "config.yaml", "exp", "ctc"),
        "output exp html": ("new", "new/a", "a.png", "exp"),
        "jobs shard_size seed size beam layer last best updates": ("1", "2", "30"),
        "hours segment_seconds validation_share lm_weight word_score": ("0.0005", "0.5", "1"),
        "batch_seconds chunk_seconds overlap_seconds": ("0.5", "2", "30"),
        "overrides override": ("data.min_seconds=0.3", "batch.micro_batches=2"),
        "audio": ("u0.wav", "folder", "cuts.jsonl"),
        "corpus": ("folder",),
        "metrics": ("results.json",),
        "identifiers": ("ids",),
        "lm": ("lm.arpa",),
        "lexicon": ("words.txt",),
        "vocabulary": ("letters", "letters.txt"),
        "form": ("flac", "opus", "mp3", "huggingface", "torchaudio"),
        "file_format": ("npy", "safetensors"),
    }.items()
    for name in names.split()
}
ALWAYS = {"train": ["trainer.updates=5"], "finetune": ["trainer.updates=5"]}  # so that it ends


def commands(group: Any, *words: str) -> Iterator[tuple[list[str], Any]]:
    """Every command, with the words that call it."""
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, *words, name)
        else:
            yield [*words, name], one


@st.composite
def arguments(draw: st.DrawFn, good: Good) -> list[str]:
    """A command with its arguments and some of its options."""
    words, one = draw(st.sampled_from(list(commands(get_command(app)))))
    odd = draw(st.sampled_from([0, 0, 1, 3]))  # of ten values

    def value(name: str) -> str:
        if name in USUAL and draw(st.integers(0, 9)) >= odd:
            return draw(st.sampled_from(USUAL[name]))
        return draw(st.sampled_from([*FILES, *ODD_WORDS]) | st.text(max_size=4)).replace("\0", "")

    found = [*words]
    for parameter in one.params:
        if parameter.param_type_name == "argument":
            several = parameter.nargs < 0 and draw(st.booleans())
            found += [value(parameter.name) for _ in range(parameter.required + several)]
        elif parameter.name != "nproc_per_node" and (parameter.required or draw(st.integers(0, 4)) == 0):
            found += [draw(st.sampled_from(parameter.opts)), *([] if parameter.is_flag else [value(parameter.name)])]
    if odd and draw(st.integers(0, 9)) == 0:
        found.insert(draw(st.integers(0, len(found))), draw(st.sampled_from(["--bogus", "-x", "", "more"])))
    return [*found, *ALWAYS.get(words[0], [])]


def check_arguments(words: list[str], good: Good) -> None:
    for name in FILES:
        copy: Callable[..., object] = shutil.copytree if (good.folder / name).is_dir() else shutil.copy
        copy(good.folder / name, name)
    for folder in ("empty", "folder"):
        Path(folder).mkdir()
    shutil.copy("u0.wav", "folder/a.wav")
    Path("folder/loop.wav").symlink_to("loop.wav")
    Path("ids").write_text("u0\n")
    Path("loop").symlink_to("loop")
    found = run(*words)
    if found.code:
        files = [name for name in found.new_files if not (Path(name).is_dir() or name.startswith("shards"))]
        assert [name for name in files if not name.endswith((".index.npy", ".bad_audio", "headers.sqlite"))] == []


class Kind(NamedTuple):
    """A kind of input."""

    draw: Callable[[Good], SearchStrategy[Any]]
    check: Callable[[Any, Good], None]


KINDS = {
    "settings file": Kind(settings_files, check_settings),
    "overrides": Kind(overrides, check_overrides),
    "manifest": Kind(manifests, check_manifest),
    "index": Kind(index_files, check_index),
    "audio": Kind(audio_files, check_audio),
    "shard": Kind(shards, check_shard),
    "transcript": Kind(transcripts, check_transcript),
    "vocabulary": Kind(vocabularies, check_vocabulary),
    "sentence pieces": Kind(piece_models, check_pieces),
    "language model": Kind(language_models, check_language_model),
    "ids": Kind(identifiers, check_identifiers),
    "run folder": Kind(run_folders, check_run_folder),
    "results": Kind(results_files, check_results),
    "arguments": Kind(arguments, check_arguments),
}


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
    ("arguments", ["data", "prepare", "folder", "folder", "new", "--skip-unreadable"]),
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
    for arguments, start in (
        (["config", "show", tmp_path / "deep.yaml"], f"error: {tmp_path / 'deep.yaml'}: not valid YAML: "),
        (["data", "index", tmp_path / "cuts.jsonl"], f"error: {tmp_path / 'cuts.jsonl'}: line 2 is not a Lhotse cut"),
        (["data", "index", "\udcff"], "error: \\udcff: no such manifest"),
        (["data", "prepare", "folder", "x" * 300, tmp_path], f"error: {'x' * 300}: no such folder"),
    ):
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(start) and done.stderr.count("\n") == 1, done.stderr
