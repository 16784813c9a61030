"""Kinds of damaged files: how to draw one from good files, and how to give it to the commands that read it."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.corpora.test_timed_text import FORMS as TIMED_TEXTS
from tests.helpers.faults import Outcome, in_time, no_programs, run
from tests.helpers.good_files import AUDIO_FORMATS, METRICS, RESULTS, Good
from tests.helpers.odd_input import (
    ODD_BYTES,
    ODD_NUMBERS,
    as_lines,
    bytes_like,
    documents_like,
    odd_values,
)
from w2vscale.config import load_config
from w2vscale.corpora.shard_index import index_shards
from w2vscale.data.assembly import Assembler
from w2vscale.data.audio import AudioError
from w2vscale.data.manifest import Corpus
from w2vscale.data.stream import open_stream
from w2vscale.data.vocabulary import LETTERS
from w2vscale.errors import UserError
from w2vscale.inference.decoding import BeamSearch, build_decoder
from w2vscale.inference.utterances import find_utterances
from w2vscale.objectives import all_settings, build_objective


def assert_wrote(found: Outcome, *names: str, always: tuple[str, ...] = ()) -> None:
    """A command wrote only files (or into folders) that it documents, and only `always` if it refused its input."""
    allowed = {*always, *(() if found.code else names)}
    assert [file for file in found.new_files if file.split("/")[0] not in allowed] == [], found


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


LISTING, HEADERS, INDEX = "cuts.jsonl.bad_audio", "cuts.jsonl.bad_headers", "cuts.jsonl.index.npy"


def check_manifest(content: bytes, good: Good) -> None:
    Path("cuts.jsonl").write_bytes(content)
    assert_wrote(run("data", "index", "cuts.jsonl"), INDEX)
    assert_wrote(run("data", "validate", "cuts.jsonl"), always=(HEADERS, INDEX))
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
    assert_wrote(run("data", "validate", "cuts.jsonl"), always=(HEADERS,))
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
        (utterance,) = find_utterances([path])
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
    settings = ["data.mode=stream", "data.max_seconds=2", "data.min_seconds=0.3", "data.workers=0"]
    config = load_config("tiny", [*settings, "batch.max_seconds=4", "batch.micro_batches=2"])
    data = config.data.model_copy(update={"train": [Path()]})
    assemble = Assembler(build_objective(config), config.model, seed=0)
    with in_time(), no_programs(), suppress(UserError):
        index_shards(Path())
        stream = open_stream(assemble, model=config.model, data=data, batch=config.batch)
        for window in stream.windows(range(2), micro_batches=2, rank=0, world_size=1):
            assert all("\n" not in bad.reason for batch in window for bad in batch.bad)


def transcripts(good: Good) -> SearchStrategy[bytes]:
    utf16 = st.text(max_size=40).map(lambda text: text.encode("utf-16"))
    return st.binary(max_size=40) | utf16 | bytes_like(b"HELLO WORLD\n")


def check_transcript(content: bytes, good: Good) -> None:
    Path("audio").mkdir()
    shutil.copy(good.folder / "u0.wav", "audio/a.wav")
    shutil.copy(good.folder / "u0.wav", "audio/b.wav")
    Path("audio/a.txt").write_bytes(content)
    assert_wrote(run("data", "prepare", "folder", "audio", "out"), "out")
    run("data", "validate", "out/cuts_train.jsonl")
    run("data", "pieces", "out/cuts_train.jsonl", "-o", "x.model", "--size", 9)
    assert_wrote(run("data", "vocabulary", "out/cuts_train.jsonl", "-o", "v.txt"), "v.txt")
    if Path("v.txt").exists():
        assert_wrote(run("config", "show", "ctc_1h", "objective.vocabulary=v.txt"))


def timed_texts(good: Good) -> SearchStrategy[tuple[str, bytes]]:
    """A transcript with times, by its suffix."""
    form = st.sampled_from([*TIMED_TEXTS.items()])
    return form.flatmap(lambda one: st.tuples(st.just(Path(one[0]).suffix), bytes_like(one[1].encode(), 10**6)))


def check_timed_text(drawn: tuple[str, bytes], good: Good) -> None:
    suffix, content = drawn
    Path("audio").mkdir()
    for name in ("talk", "b"):
        shutil.copy(good.folder / "u0.wav", f"audio/{name}.wav")
    Path(f"audio/talk{suffix}").write_bytes(content)
    assert_wrote(run("data", "prepare", "folder", "audio", "out", "--segment-seconds", 0.4), always=("out",))


def lists(good: Good) -> SearchStrategy[tuple[dict[str, bytes], str, bytes]]:
    """The files of lists of other toolkits, the name of one of them, and its damaged content."""
    audio = good.folder / "u0.wav"
    entries = [{"audio_filepath": str(audio), "duration": 0.5, "offset": 0.25, "text": "a"}, {"audio_filepath": "x"}]
    files = {
        "wav.scp": f"a {audio}\nb flac -cds {audio} |\nc sph2pipe -f wav -p -c 1 {audio} |\nd x.ark:12\n".encode(),
        "segments": b"a-1 a 0 0.5\na-2 a 0.25 -1\nb-1 b 0.1 0.9\n",
        "text": b"a-1 HELLO WORLD\na-2 A\n",
        "list.jsonl": as_lines(*entries),
        "list.tsv": f"{good.folder}\nu0.wav\t16000\nu1.flac\t16000\n".encode(),
        "list.ltr": b"H E L L O | W |\nA |\n",
        "train.tsv": b"client_id\tpath\tsentence\tlocale\na\tu0.wav\thello\ten\n",
    }
    names = st.sampled_from([*files])
    return names.flatmap(lambda name: st.tuples(st.just(files), st.just(name), bytes_like(files[name], 10**6)))


def check_list(drawn: tuple[dict[str, bytes], str, bytes], good: Good) -> None:
    files, changed, content = drawn
    Path("en/clips").mkdir(parents=True)
    shutil.copy(good.folder / "u0.wav", "en/clips/u0.wav")
    for name, good_content in files.items():
        (Path("en") / name).write_bytes(content if name == changed else good_content)
    for words in (["kaldi", "en"], ["manifest", "en/list.jsonl"], ["fairseq", "en/list.tsv"], ["commonvoice", "en"]):
        assert_wrote(run("data", "prepare", *words, f"out-{words[0]}"), always=(f"out-{words[0]}",))


def vocabularies(good: Good) -> SearchStrategy[bytes]:
    table = as_lines({symbol: number for number, symbol in enumerate(["<pad>", "[UNK]", "|", "é", "ɔ̃"])})
    counts = "".join(f"{symbol} {number}\n" for number, symbol in enumerate("|ETAé", start=7)).encode()
    kinds = [good.bytes("letters.txt"), table, counts, counts.decode().encode("utf-16")]
    return st.one_of([bytes_like(kind) for kind in kinds]) | st.binary(max_size=30)


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


class Kind(NamedTuple):
    """A kind of input."""

    draw: Callable[[Good], SearchStrategy[Any]]
    check: Callable[[Any, Good], None]


KINDS_OF_FILES = {
    "settings file": Kind(settings_files, check_settings),
    "overrides": Kind(overrides, check_overrides),
    "manifest": Kind(manifests, check_manifest),
    "index": Kind(index_files, check_index),
    "audio": Kind(audio_files, check_audio),
    "shard": Kind(shards, check_shard),
    "transcript": Kind(transcripts, check_transcript),
    "timed text": Kind(timed_texts, check_timed_text),
    "list": Kind(lists, check_list),
    "vocabulary": Kind(vocabularies, check_vocabulary),
    "sentence pieces": Kind(piece_models, check_pieces),
    "language model": Kind(language_models, check_language_model),
    "ids": Kind(identifiers, check_identifiers),
    "run folder": Kind(run_folders, check_run_folder),
    "results": Kind(results_files, check_results),
}
