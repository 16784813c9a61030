"""Datasets of Hugging Face: Parquet and Arrow folders, columns by type and name, audio as it is encoded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from tests.corpora.test_folder import error_of
from tests.corpora.test_lists import cuts_in
from tests.corpora.test_named import said
from tests.helpers.audio import noise, write_audio
from tests.helpers.trained import trains
from w2vscale.corpora.huggingface import prepare_huggingface
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
        ("cuts_train.jsonl", 4),
        ("cuts_dev.jsonl", 2),
    ]
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out", splits=["dev"])
    assert [one.path.name for one in report.manifests] == ["cuts_dev.jsonl"]
    message = error_of(prepare_huggingface, str(tmp_path / "dataset"), tmp_path / "out", splits=["tset"])
    assert message.endswith("has no such split; choose from train, dev")


def test_parquet_files_as_on_the_hub(rows: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    for number in range(2):
        rows.shard(2, number).to_parquet(folder / f"train-{number:05d}-of-00002.parquet")
    rows.select([3]).to_parquet(folder / "test-00000-of-00001.parquet")
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert {one.path.name: one.utterances for one in report.manifests} == {"cuts_test.jsonl": 1, "cuts_train.jsonl": 4}


def test_parquet_of_another_program_and_a_repeated_call(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

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
            assert f"{name}: its samples " in error_of(prepare_huggingface, source, tmp_path / str(number))
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
    assert message == f"{source}: no column with audio; name it with --audio-column: sound, words"
    message = error_of(prepare_huggingface, source, tmp_path / "out", audio="sond")
    assert message == f"--audio-column sond: {source} has the columns sound, words"
    report = prepare_huggingface(source, tmp_path / "out", audio="sound", text="words")
    assert {name: said(cut)[0] for name, cut in cuts_in(report).items()} == {"train-00000000": "eins"}
    assert [one.reason for one in report.unusable] == [
        "train-00000001: it has no audio",
        f"train-00000002: there is no audio file '{tmp_path / 'gone.flac'}'",
    ]


def test_damaged_audio_and_files(rows: Any, tmp_path: Path) -> None:
    values = {**ROWS, "audio": [{"bytes": b"not audio", "path": "1.flac"}, *ROWS["audio"][1:]]}
    dataset = datasets.Dataset.from_dict(values).cast_column("audio", datasets.Audio(decode=False))
    dataset.to_parquet(tmp_path / "dataset" / "train.parquet")
    report = prepare_huggingface(str(tmp_path / "dataset"), tmp_path / "out")
    assert [one.kind for one in report.unusable] == ["undecodable"] and report.manifests[0].utterances == 3
    (tmp_path / "dataset" / "train.parquet").write_bytes(b"PAR1 is not enough")
    message = error_of(prepare_huggingface, str(tmp_path / "dataset"), tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'dataset'}: cannot be ")


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    assert "has no .parquet or .arrow file" in error_of(prepare_huggingface, str(tmp_path), tmp_path / "out")
    missing = str(tmp_path / "no")
    assert error_of(prepare_huggingface, missing, tmp_path / "out").startswith(f"{missing}: no such folder")
