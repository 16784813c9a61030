"""Datasets of Hugging Face: Parquet and Arrow folders, columns by type and name, audio as it is encoded."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from lhotse import CutSet

from tests.corpora.test_folder import error_of
from tests.corpora.test_lists import cuts_in
from tests.corpora.test_named import said
from tests.helpers.audio import noise, write_audio, write_text
from tests.helpers.trained import trains
from w2vscale.corpora.finding import Unusable
from w2vscale.corpora.huggingface import prepare_huggingface
from w2vscale.corpora.kaldi import WITHOUT_TEXT
from w2vscale.corpora.preparing import Options
from w2vscale.corpora.report import Report
from w2vscale.corpora.tables import TableFile
from w2vscale.data.audio import read_audio


def encoded(seconds: float, form: str, seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(seconds, seed=seed), 16_000, format=form)
    return file.getvalue()


ROWS = {
    "id": ["a/1", "b", "c", "d"],
    "audio": [
        {"bytes": encoded(1.0, "FLAC", 1), "path": "1.flac"},
        {"bytes": encoded(1.5, "WAV", 2), "path": None},
        {"bytes": encoded(1.25, "MP3", 3), "path": "3.mp3"},
        {"bytes": encoded(2.0, "OGG", 4), "path": "sub/4.ogg"},
    ],
    "sentence": ["eins", "zwei Töne", None, "vier"],
    "client_id": ["anna", "bert", "anna", None],
    "locale": ["de"] * 4,
}


@pytest.fixture
def rows() -> Any:
    return datasets.Dataset.from_dict(ROWS).cast_column("audio", datasets.Audio(decode=False))


def check(found: dict[str, Any]) -> None:
    assert {name: round(cut.duration, 3) for name, cut in found.items()} == {"a/1": 1.0, "b": 1.5, "c": 1.25, "d": 2.0}
    assert said(found["b"]) == ("zwei Töne", "bert", "de") and said(found["c"])[0] is None
    assert [Path(cut.recording.sources[0].source).suffix for cut in found.values()] == [".flac", ".wav", ".mp3", ".ogg"]
    assert np.allclose(read_audio(found["b"], sampling_rate=16_000), noise(1.5, seed=2), atol=1e-4)


def test_a_folder_of_save_to_disk(rows: Any, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "dataset")
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    check(cuts_in(report))
    trains(report.manifests[0].path, tmp_path / "exp")


def test_splits_of_save_to_disk(rows: Any, tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": rows, "dev": rows.select([0, 1])})
    both.save_to_disk(tmp_path / "dataset")
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert [(one.path.name, one.utterances) for one in report.manifests] == [
        ("cuts_dev.jsonl", 2),
        ("cuts_train.jsonl", 4),
    ]
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out", splits=["dev"])
    assert [one.path.name for one in report.manifests] == ["cuts_dev.jsonl"]
    message = error_of(prepare_huggingface, str(tmp_path / "dataset"), tmp_path / "out", splits=["tset"])
    assert message.endswith("has no such split; choose from dev, train")


def test_parquet_files_as_on_the_hub(rows: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    for number in range(2):
        rows.shard(2, number).to_parquet(folder / f"train-{number:05d}-of-00002.parquet")
    rows.select([3]).to_parquet(folder / "test-00000-of-00001.parquet")
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert {one.path.name: one.utterances for one in report.manifests} == {"cuts_test.jsonl": 1, "cuts_train.jsonl": 4}
    assert [note.split(":")[0] for note in +report.notes] == ["row of test", "rows of train", WITHOUT_TEXT]
    (folder / "train-00001-of-00002.parquet").rename(folder / "train-00003-of-00007.parquet")
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert report.notes["shards of train that are not in the folder"] == 5


def test_arrow_in_the_format_of_files(tmp_path: Path) -> None:
    table = pyarrow.table(ROWS)
    (tmp_path / "dataset").mkdir()
    path = str(tmp_path / "dataset" / "train.arrow")
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    check(cuts_in(prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")))


def test_parquet_of_another_program_and_a_repeated_call(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(ROWS), tmp_path / "dataset" / "train.parquet")
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    check(cuts_in(report))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "audio").rglob("*.*")}
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert (report.headers_read, report.headers_unchanged) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "audio").rglob("*.*")} == before


def test_another_dataset_in_the_same_folder_replaces_the_audio(rows: Any, tmp_path: Path) -> None:
    sound = [{"bytes": encoded(1.0, "WAV", seed), "path": None} for seed in (1, 2)]
    for number, words in ((0, "eins"), (1, "zwei")):
        table = {"audio": sound[number : number + 1], "text": [words]}
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / "dataset" / "train.parquet")
        (cut,) = cuts_in(prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")).values()
        assert said(cut)[0] == words
        assert np.allclose(read_audio(cut, sampling_rate=16_000), noise(1.0, seed=number + 1), atol=1e-4)


def test_ids_that_repeat_samples_and_splits_in_several_folders(rows: Any, tmp_path: Path) -> None:
    array = {"array": noise(0.5).tolist(), "sampling_rate": 16_000}
    for language in ("en", "de"):
        table = {"id": [7, 7, 8], "audio": [array] * 3, "text": ["a", "b", "c"]}
        path = tmp_path / "dataset" / language / "train-00000-of-00001.parquet"
        datasets.Dataset.from_dict(table).to_parquet(path)
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert [one.path.name for one in report.manifests] == ["cuts_de_train.jsonl", "cuts_en_train.jsonl"]
    found = {cut.id: said(cut)[0] for cut in CutSet.from_file(report.manifests[0].path)}
    assert found == {"7": "a", "7-1": "b", "8": "c"}
    assert report.notes["rows of en_train: audio from audio, text from text, id from id"] == 3
    assert report.unusable == []
    message = error_of(prepare_huggingface, str(tmp_path / "dataset"), tmp_path / "out", config="en")
    assert message.startswith("--config en: only a dataset on the Hub has configurations")


def test_decoded_samples_of_every_form(tmp_path: Path) -> None:
    sound = noise(0.5, seed=3)
    forms = {
        "integers": ((sound * 2**15).round().astype(int).tolist(), 16_000),
        "channels first": ([sound.tolist()] * 2, 16_000),
        "channels last": (np.stack([sound, sound], axis=1).tolist(), 16_000),
        "texts": (["a"], 16_000),
        "numbers of something else": ((sound * 2**15).tolist(), 16_000),
        "rate": (sound.tolist(), 0),
    }
    for number, (name, (array, rate)) in enumerate(forms.items()):
        rows = {"id": [name], "audio": [{"array": array, "sampling_rate": rate}], "text": ["x"]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"dataset{number}" / "train.parquet")
        source = str(tmp_path / f"dataset{number}")
        if number >= 3:
            assert "train.parquet: row 0: its samples " in error_of(prepare_huggingface, source, tmp_path / str(number))
            continue
        (cut,) = cuts_in(prepare_huggingface(source, tmp_path / str(number))).values()
        assert cut.num_channels == 1 + (number > 0)
        assert np.allclose(read_audio(cut, sampling_rate=16_000), sound, atol=1e-4)


def test_other_columns_paths_and_rows_without_audio(tmp_path: Path) -> None:
    file = write_audio(tmp_path / "a.flac", noise(1.0))
    values = {
        "sound": [str(file), None, str(tmp_path / "gone.flac")],
        "words": ["eins", "zwei", "drei"],
    }
    datasets.Dataset.from_dict(values).to_parquet(tmp_path / "dataset" / "train.parquet")
    source = str(tmp_path / "dataset")
    message = error_of(prepare_huggingface, source, tmp_path / "out")
    assert message.endswith("train.parquet: no column with audio; name it with --audio-column: sound, words")
    message = error_of(prepare_huggingface, source, tmp_path / "out", audio="sond")
    assert message.endswith("train.parquet: has no column sond (--audio-column); its columns are sound, words")
    report = prepare_huggingface(source, tmp_path / "out", audio="sound", text="words")
    assert {name: said(cut)[0] for name, cut in cuts_in(report).items()} == {"train-00000000": "eins"}
    assert [one.reason for one in report.unusable] == [
        "row 1: it has no audio",
        f"row 2: there is no audio file '{tmp_path / 'gone.flac'}'",
    ]


def test_damaged_audio_and_files(rows: Any, tmp_path: Path) -> None:
    values = {**ROWS, "audio": [{"bytes": b"not audio", "path": "1.flac"}, *ROWS["audio"][1:]]}
    dataset = datasets.Dataset.from_dict(values).cast_column("audio", datasets.Audio(decode=False))
    dataset.to_parquet(tmp_path / "dataset" / "train.parquet")
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert [one.kind for one in report.unusable] == ["undecodable"] and report.manifests[0].utterances == 3
    (tmp_path / "dataset" / "train.parquet").write_bytes(b"PAR1 is not enough")
    message = error_of(prepare_huggingface, str(tmp_path / "dataset"), tmp_path / "out")
    assert f"; {tmp_path / 'dataset' / 'train.parquet'}: cannot be read: Parquet" in message


def table_of(*words: str, audio: Any = None, **columns: Any) -> pyarrow.Table:
    """A table with a row for each word. Its audio differs from row to row."""
    sounds = [{"bytes": encoded(0.5, "FLAC", len(word)), "path": f"{word}.flac"} for word in words]
    return pyarrow.table({"audio": audio or sounds, "text": [*words], **columns})


def write_table(path: Path, table: pyarrow.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, **options)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, **options)
    return path


def texts_by_manifest(report: Report) -> dict[str, list[str | None]]:
    return {
        one.path.name[len("cuts_") : -len(".jsonl")]: [said(cut)[0] for cut in CutSet.from_file(one.path)]
        for one in report.manifests
    }


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"train": [0, 1]}),
        (["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"], {"train": [0]}),
        (["default/train/0000.parquet", "default/train/0001.parquet"], {"train": [0, 1]}),
        (["default/partial-train/0000.parquet", "default/test/0000.parquet"], {"partial-train": [0], "test": [1]}),
        (["de-DE/train-00000-of-00001.parquet", "en-US/train.parquet"], {"de-DE_train": [0], "en-US_train": [1]}),
        (["my data.parquet", "common-voice.parquet"], {"my data": [0], "common-voice": [1]}),
        (["news-2019.parquet", "news-2020.arrow"], {"news-2019": [0], "news-2020": [1]}),
        (["train.parquet", "train.arrow"], {"train": [1], "train-2": [0]}),
        (["train.parquet", "train/0000.parquet"], {"train": [0], "train-2": [1]}),
        (["train.parquet", "test.arrow"], {"train": [0], "test": [1]}),
        (["a_b/train.parquet", "a/b_train.parquet"], {"a_b_train": [1], "a_b_train-2": [0]}),
        (["a-train.arrow", "b-train.arrow"], {"a_train": [0], "b_train": [1]}),
        (
            ["librispeech_asr-train.clean.100-00000-of-00001.arrow", "librispeech_asr-test.clean.arrow"],
            {"train.clean.100": [0], "test.clean": [1]},
        ),
        (["c/v-train-00001-of-00002.arrow", "c/v-train-00000-of-00002.arrow"], {"train": [1, 0]}),
    ],
)
def test_splits_by_the_names_of_files(files: list[str], splits: dict[str, list[int]], tmp_path: Path) -> None:
    for number, name in enumerate(files):
        write_table(tmp_path / "dataset" / name, table_of("x" * (number + 1)))
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert texts_by_manifest(report) == {
        split: ["x" * (number + 1) for number in numbers] for split, numbers in splits.items()
    }
    assert report.unusable == [] and not report.others
    ids = [cut.id for one in report.manifests for cut in CutSet.from_file(one.path)]
    assert len(set(ids)) == len(files)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_damaged_shard_is_left_out_alone(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    for number in range(3):
        write_table(folder / f"train-{number:05d}-of-00003{suffix}", table_of(f"{number}"))
    shard = folder / f"train-00001-of-00003{suffix}"
    whole = shard.read_bytes()
    for content in (b"", b"PAR1xx", whole[: len(whole) // 2], b"x" * len(whole)):
        shard.write_bytes(content)
        report = prepare_huggingface(str(folder), tmp_path / "out")
        assert texts_by_manifest(report) == {"train": ["0", "2"]}
        (one,) = report.unusable
        assert one.path == str(shard) and one.kind == "unreadable" and one.reason.startswith("cannot be read")
    message = error_of(prepare_huggingface, str(folder), tmp_path / "out", options=Options(strict=True))
    assert message.startswith(f"{shard}: cannot be read")
    shard.unlink()
    shard.symlink_to("gone")
    (one,) = prepare_huggingface(str(folder), tmp_path / "out").unusable
    assert one.path == str(shard) and "No such file" in one.reason


@pytest.mark.parametrize(
    ("name", "options", "rows_before"),
    [("train.parquet", {"row_group_size": 20}, 16), ("train.arrow", {"max_chunksize": 20}, 20)],
)
def test_rows_before_the_damage_are_used(name: str, options: Any, rows_before: int, tmp_path: Path) -> None:
    words = ["x" * length for length in range(1, 41)]
    path = write_table(tmp_path / "dataset" / name, table_of(*words), **options)
    content = bytearray(path.read_bytes())
    middle = len(content) * 6 // 10
    if name == "train.arrow":
        del content[middle:]
    else:
        content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert texts_by_manifest(report) == {"train": words[:rows_before]}
    (one,) = report.unusable
    assert one.path == str(path) and one.reason.startswith(f"cannot be read from row {rows_before} on: ")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_damaged_row_is_left_out_alone(suffix: str, tmp_path: Path) -> None:
    letters = pyarrow.py_buffer(b"a\xffc")
    text = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(np.arange(4, dtype=np.int32)), letters)
    table = table_of("a", "bb", "ccc").set_column(1, "text", text)
    path = write_table(tmp_path / "dataset" / f"train{suffix}", table)
    report = prepare_huggingface(str(path.parent), tmp_path / "out")
    assert texts_by_manifest(report) == {"train": ["a", "c"]}
    (one,) = report.unusable
    assert one.path == str(path) and one.reason.startswith("row 1: In column 1: Invalid: Invalid UTF8")


def test_damaged_offsets(tmp_path: Path) -> None:
    """Without a check of each row, these end the process, or give what is in memory."""
    path = write_table(tmp_path / "dataset" / "train.arrow", table_of("a", "bb", "ccc"))
    offsets, damaged = (np.array([0, 1, 3, end], dtype=np.int32).tobytes() for end in (6, 2**30))
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, damaged))
    report = prepare_huggingface(str(path.parent), tmp_path / "out")
    assert texts_by_manifest(report) == {"train": ["a", "bb"]} and len(report.unusable) == 1


def test_a_page_with_a_wrong_checksum(tmp_path: Path) -> None:
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    path = write_table(tmp_path / "dataset" / "train.parquet", table_of("one", "seven"), **options)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\5\0\0\0seven", b"\5\0\0\0eleve"))
    assert path.read_bytes() != content
    message = error_of(prepare_huggingface, str(path.parent), tmp_path / "out")
    assert f"{path}: cannot be read from row 0 on: could not verify page integrity" in message


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_file_is_never_in_memory_as_a_whole(suffix: str, tmp_path: Path) -> None:
    table = pyarrow.table({"audio": [np.random.default_rng(row).bytes(100_000) for row in range(200)]})
    options = {"row_group_size": 20} if suffix == ".parquet" else {"max_chunksize": 20}
    path = write_table(tmp_path / f"train{suffix}", table, **options)
    del table
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in TableFile(path).rows(["audio"])]
    assert len(held) == 200 and max(held) < path.stat().st_size / 2


def test_folder_of_save_to_disk_with_a_lost_and_a_stale_shard(rows: Any, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "dataset", num_shards=2)
    state = json.loads((tmp_path / "dataset" / "state.json").read_text())
    (tmp_path / "dataset" / "state.json").write_text(json.dumps({**state, "_split": "../validation"}))
    lost = tmp_path / "dataset" / "data-00001-of-00002.arrow"
    lost.rename(lost.with_name("data-00000-of-00001.arrow"))
    write_table(tmp_path / "dataset" / "cache-0123456789abcdef.arrow", table_of("map"))
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert texts_by_manifest(report) == {"_validation": ["eins", "zwei Töne"]}
    assert report.unusable == [Unusable(str(lost), "missing", "no such file")]
    assert report.others == {(".arrow", "not listed in state.json"): 1, (".arrow", "cache of datasets"): 1}


def test_other_files_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    write_table(folder / "train.parquet", table_of("a", "b", audio=["clips/a.wav", "b.wav"]))
    write_audio(folder / "clips" / "a.wav", noise(0.5))
    write_audio(folder / "b.wav", noise(0.5))
    write_audio(folder / "more.wav", noise(0.5))
    for name in (
        "README.md",
        "LICENSE",
        "dataset_infos.json",
        ".gitattributes",
        ".cache/x",
        "._train.parquet",
        "t.csv",
    ):
        write_text(folder / name)
    (folder / "loop").symlink_to(folder)
    report = prepare_huggingface(str(folder), tmp_path / "out")
    assert texts_by_manifest(report) == {"train": ["a", "b"]}
    assert report.others == {
        (".wav", "not Parquet or Arrow"): 1,
        (".csv", "not Parquet or Arrow"): 1,
        (".parquet", "hidden"): 1,
        ("(no suffix)", "link to a folder that is used anyway"): 1,
    }
    assert report.left_out == [(str(folder / "more.wav"), "not Parquet or Arrow")]


def test_paths_of_audio_begin_beside_the_table_then_at_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = [write_audio(Path(name).absolute(), noise(0.5)) for name in ("d/de/a.wav", "d/b.wav", "c.wav")]
    for name in ("d/a.wav", "a.wav", "b.wav"):
        write_audio(Path(name), noise(0.7))
    write_table(Path("d/de/train.parquet"), table_of("a", "b", "c", audio=["a.wav", "b.wav", "c.wav"]))
    report = prepare_huggingface("d", Path("out"))
    assert {cut.recording.sources[0].source for cut in cuts_in(report).values()} == {str(path) for path in expected}


def test_bytes_decide_the_format(tmp_path: Path) -> None:
    names = {
        "z.m4a": "FLAC",
        "y.flac": "OGG",
        "x.aac": "MP3",
        "no": "WAV",
        "v.xyz": "AIFF",
        "w.au": "AU",
        "u.xyz": "AU",
    }
    sounds = [{"bytes": encoded(0.5, form, 1), "path": name} for name, form in names.items()]
    write_table(tmp_path / "dataset" / "train.parquet", table_of(*names, audio=sounds))
    found = cuts_in(prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out"))
    suffixes = [Path(cut.recording.sources[0].source).suffix for cut in found.values()]
    assert suffixes == [".flac", ".ogg", ".mp3", ".wav", ".aiff", ".au", ".wav"]


def test_labels_and_texts_that_are_no_text(tmp_path: Path) -> None:
    sound = {"bytes": encoded(0.5, "FLAC", 1), "path": None}
    labels = datasets.ClassLabel(names=["de", "en"])
    encoded_audio = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features(
        {"audio": encoded_audio, "text": datasets.Value("string"), "language": labels, "speaker": labels}
    )
    values = {"audio": [sound] * 2, "text": ["a", "b"], "language": ["en", None], "speaker": [-1, 0]}
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "labels" / "train.parquet")
    found = cuts_in(prepare_huggingface(str(tmp_path / "labels"), tmp_path / "out"))
    assert [said(cut) for cut in found.values()] == [("a", None, "en"), ("b", "de", None)]

    kinds = {
        "a list": ["a", "b"],
        "a struct": {"x": "a"},
        "a number": 1.5,
        "a truth value": True,
        "of type bytes": b"a",
    }
    for number, value in enumerate(kinds.values()):
        audio = [sound["bytes"]] * 2
        write_table(tmp_path / "texts" / f"t{number}.parquet", pyarrow.table({"audio": audio, "text": [value, None]}))
    report = prepare_huggingface(str(tmp_path / "texts"), tmp_path / "out")
    assert texts_by_manifest(report) == {f"t{number}": [None] for number in range(len(kinds))}
    assert [one.reason for one in report.unusable] == [f"row 0: its text is {kind}, not text" for kind in kinds]
    path = write_table(
        tmp_path / "numbers" / "train.parquet", table_of("a", "b", speaker=[7, None], language=[["x"], None])
    )
    report = prepare_huggingface(str(path.parent), tmp_path / "out")
    assert [said(cut) for cut in CutSet.from_file(report.manifests[0].path)] == [("b", None, None)]
    assert [one.reason for one in report.unusable] == ["row 0: its language is a list, not text"]


def test_output_that_cannot_be_written_ends_the_command(tmp_path: Path) -> None:
    write_table(tmp_path / "dataset" / "train.parquet", table_of("a", "b"))
    (tmp_path / "file").touch()
    message = error_of(prepare_huggingface, str(tmp_path / "dataset"), tmp_path / "file")
    assert (
        message
        == f"{tmp_path / 'file' / 'audio' / 'train' / '0' / '00000000.flac'}: cannot be written: Not a directory"
    )


def test_a_dataset_on_the_hub_is_not_decoded(rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name has a dot, and a second column of audio is never read."""
    hub = rows.add_column("other", ROWS["audio"]).cast_column("other", datasets.Audio())
    stream = hub.cast_column("audio", datasets.Audio()).to_iterable_dataset()
    asked: list[object] = []

    def load_dataset(*arguments: object, **options: object) -> Any:
        asked.extend(arguments)
        return datasets.IterableDatasetDict({"train.clean.100": stream})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    report = prepare_huggingface("MLCommons/peoples_speech_v1.0", tmp_path / "out", config="clean")
    assert asked == ["MLCommons/peoples_speech_v1.0", "clean"]
    assert [one.path.name for one in report.manifests] == ["cuts_train.clean.100.jsonl"]
    check(cuts_in(report))


def test_names_that_are_neither_a_folder_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> Any:
        raise ConnectionError("no\nconnection")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "common_voice").mkdir(parents=True)
    for name in ("./data/comon_voice", f"{tmp_path}/data/comon_voice", "data/common_voice/de", "data/comon_voice/"):
        assert error_of(prepare_huggingface, name, tmp_path / "out").startswith(f"{name}: no such folder")
    message = error_of(prepare_huggingface, "data/comon_voice", tmp_path / "out")
    reason = "cannot be opened as a dataset: no connection; did you mean data/common_voice?"
    assert message == f"data/comon_voice: {reason}"


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    assert "has no .parquet or .arrow file" in error_of(prepare_huggingface, str(tmp_path), tmp_path / "out")
    missing = str(tmp_path / "no")
    assert error_of(prepare_huggingface, missing, tmp_path / "out").startswith(f"{missing}: no such folder")
