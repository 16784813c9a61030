"""Indexed manifests: random access, several as one corpus, and what is refused."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet
from lhotse.cut import PaddingCut

from tests.audio import SmallCorpus, cut_of, noise, tone, write_audio, write_manifest
from w2vscale.data.manifest import Corpus, Manifest, audio_path, build_index, index_path
from w2vscale.errors import UserError

LINE = {
    "id": "a",
    "start": 0.0,
    "duration": 3.0,
    "channel": 0,
    "type": "MonoCut",
    "recording": {
        "id": "a",
        "sources": [{"type": "file", "channels": [0], "source": "a.flac"}],
        "sampling_rate": 16000,
        "num_samples": 48000,
        "duration": 3.0,
        "channel_ids": [0],
    },
}


def copy_of(corpus: SmallCorpus, folder: Path) -> Path:
    return Path(shutil.copy(corpus.train, folder / "cuts.jsonl"))


def error_of(path: Path, *, index: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        build_index(path) if index else Manifest(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestIndex:
    def test_cuts_are_those_that_lhotse_reads(self, small_corpus: SmallCorpus) -> None:
        manifest = Manifest(small_corpus.train)
        expected = list(CutSet.from_file(small_corpus.train))
        assert [manifest.cut(number) for number in range(len(manifest))] == expected
        assert manifest.durations.tolist() == [cut.duration for cut in expected]

    def test_any_order_of_access_gives_the_same(self, small_corpus: SmallCorpus) -> None:
        manifest = Manifest(small_corpus.train)
        ids = [manifest.cut(number).id for number in range(len(manifest))]
        assert [manifest.cut(number).id for number in (23, 0, 11, 23)] == [ids[23], ids[0], ids[11], ids[23]]

    @pytest.mark.parametrize(
        "text",
        [
            "{0}\n{1}\n{2}\n",
            "{0}\n{1}\n{2}",
            "\n{0}\n\n  \n{1}\n{2}\n\n",
            "{0}\r\n{1}\r\n{2}\r\n",
        ],
        ids=["plain", "no newline at the end", "blank lines", "carriage returns"],
    )
    def test_lines_may_be_separated_in_any_usual_way(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "cuts.jsonl"
        lines = [json.dumps({**LINE, "id": name}, ensure_ascii=False) for name in ("eins", "zwölf", "三")]
        path.write_bytes(text.format(*lines).encode())
        assert build_index(path) == 3
        manifest = Manifest(path)
        assert [manifest.cut(number).id for number in range(3)] == ["eins", "zwölf", "三"]

    def test_progress_ends_at_the_files_size(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        path = copy_of(small_corpus, tmp_path)
        build_index(path, lambda done, total: seen.append((done, total)))
        assert seen[-1] == (path.stat().st_size, path.stat().st_size)

    def test_only_manifest_and_index_are_left_in_the_folder(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        build_index(path)
        assert sorted(tmp_path.iterdir()) == [path, index_path(path)]

    def test_a_copy_made_for_another_process_reads_the_same(self, small_corpus: SmallCorpus) -> None:
        manifest = Manifest(small_corpus.train)
        again = pickle.loads(pickle.dumps(manifest))
        assert again.cut(5) == manifest.cut(5)

    def test_a_forked_process_reads_while_its_parent_does(self, small_corpus: SmallCorpus) -> None:
        corpus = Corpus([small_corpus.train])
        expected = [corpus.cut(number).id for number in range(24)]
        with multiprocessing.get_context("fork").Pool(2, initializer=_remember, initargs=(corpus,)) as pool:
            found = pool.map_async(_id_of, range(24), chunksize=1)
            assert [corpus.cut(number).id for number in range(24)] == expected
            assert found.get(timeout=60) == expected

    def test_a_manifest_that_is_replaced_is_read_as_it_was(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        build_index(path)
        manifest = Manifest(path)
        expected = manifest.cut(7)
        other = tmp_path / "other.jsonl"
        other.write_text("x" * path.stat().st_size)
        other.replace(path)
        assert manifest.cut(7) == expected


_corpus: Corpus


def _remember(corpus: Corpus) -> None:
    global _corpus
    _corpus = corpus


def _id_of(number: int) -> str:
    return _corpus.cut(number).id


class TestWhatIsRefused:
    def test_a_missing_manifest(self, tmp_path: Path) -> None:
        assert error_of(tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'}: no such manifest"
        assert error_of(tmp_path) == f"{tmp_path}: no such manifest"

    def test_a_compressed_manifest_with_how_to_convert_it(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = tmp_path / "cuts.jsonl.gz"
        path.write_bytes(gzip.compress(small_corpus.train.read_bytes()))
        assert "uncompressed JSONL" in error_of(path) and "lhotse copy" in error_of(path)

    @pytest.mark.parametrize("content", ["", "\n", " \n\n"])
    def test_an_empty_manifest(self, content: str, tmp_path: Path) -> None:
        path = tmp_path / "cuts.jsonl"
        path.write_text(content)
        assert error_of(path) == f"{path}: the manifest is empty"

    @pytest.mark.parametrize(
        "line",
        [
            "text",
            "[1, 2]",
            "3",
            "null",
            "{}",
            '{"id": "a", "duration": 3.0}',
            json.dumps({**LINE, "duration": 0.0}),
            json.dumps({**LINE, "duration": -1.0}),
            json.dumps({**LINE, "duration": float("nan")}),
            json.dumps({**LINE, "duration": float("inf")}),
            json.dumps({**LINE, "duration": "long"}),
            json.dumps({**LINE, "duration": None}),
            json.dumps({**LINE, "type": "Recording"}),
            json.dumps({**LINE, "recording": None}),
            json.dumps({**LINE, "recording": {**LINE["recording"], "sources": []}}),  # type: ignore[dict-item]
            json.dumps({key: value for key, value in LINE.items() if key != "recording"}),
            json.dumps(LINE["recording"]),
        ],
    )
    def test_a_line_that_is_no_cut_with_its_number(self, line: str, tmp_path: Path) -> None:
        path = tmp_path / "cuts.jsonl"
        path.write_text(f"{json.dumps(LINE)}\n\n{line}\n")
        assert error_of(path).startswith(f"{path}: line 3 is not a Lhotse cut")
        assert not index_path(path).exists()

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "a.flac", noise(1.0)).rename(tmp_path / "cuts.jsonl")
        assert error_of(path).startswith(f"{path}: line 1 is not a Lhotse cut")

    def test_a_cut_of_nothing_recorded(self, tmp_path: Path) -> None:
        path = tmp_path / "cuts.jsonl"
        padding = PaddingCut(id="p", duration=3.0, sampling_rate=16_000, feat_value=0.0, num_samples=48_000)
        path.write_text(json.dumps({**padding.to_dict(), "type": "PaddingCut"}) + "\n")
        assert "line 1 is not a Lhotse cut of a recording" in error_of(path)

    def test_a_cut_that_lacks_what_lhotse_needs_is_named_when_it_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "cuts.jsonl"
        path.write_text(json.dumps({key: value for key, value in LINE.items() if key != "start"}) + "\n")
        build_index(path)
        with pytest.raises(UserError, match=f"{path}: utterance 0 is not a Lhotse cut"):
            Manifest(path).cut(0)

    def test_a_folder_that_cannot_be_written(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        index_path(path).mkdir()  # a folder in the index's place: this fails for root as well
        assert error_of(path).startswith(f"{index_path(path)}: the index cannot be written: ")

    def test_a_missing_index_with_the_command_that_makes_it(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        assert error_of(path, index=False) == f"{path}: no index beside it; make one with: w2vscale data index {path}"

    def test_an_index_of_another_version_of_the_manifest(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        build_index(path)
        with path.open("a") as lines:
            lines.write(json.dumps(LINE) + "\n")
        assert error_of(path, index=False).startswith(f"{path}: changed since it was indexed; remake with: ")

    @pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY", b"PK\x03\x04"])
    def test_an_index_that_is_none(self, content: bytes, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        index_path(path).write_bytes(content)
        message = error_of(path, index=False)
        assert message.startswith(f"{index_path(path)}: not an index") and "w2vscale data index" in message

    def test_an_index_that_was_cut_off(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        build_index(path)
        content = index_path(path).read_bytes()
        index_path(path).write_bytes(content[: len(content) // 2])
        assert error_of(path, index=False).startswith(f"{index_path(path)}: not an index")

    def test_an_index_of_something_else(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        np.save(index_path(path), np.zeros(3))
        assert "w2vscale data index" in error_of(path, index=False)


class TestCorpus:
    def test_several_manifests_are_one_sequence(self, small_corpus: SmallCorpus) -> None:
        corpus = Corpus([small_corpus.validation, small_corpus.train])
        assert len(corpus) == 30
        assert [corpus.cut(number).id for number in (0, 5, 6, 29)] == [
            "validation-00",
            "validation-05",
            "train-00",
            "train-23",
        ]
        durations = [corpus.cut(number).duration for number in range(30)]
        assert corpus.samples(16_000).tolist() == [round(duration * 16_000) for duration in durations]
        assert corpus.samples(8_000).dtype == np.int64

    def test_none_at_all_names_the_setting(self) -> None:
        with pytest.raises(UserError, match=r"^data\.validation names no manifest: set data.validation="):
            Corpus([], setting="data.validation")

    def test_a_stereo_recording_is_one_utterance(self, tmp_path: Path) -> None:
        stereo = np.stack([tone(2.0, 300.0), tone(2.0, 500.0)], axis=1)
        path = write_audio(tmp_path / "a.wav", stereo)
        corpus = Corpus([write_manifest(tmp_path / "cuts.jsonl", [cut_of(path)])])
        assert len(corpus) == 1
        assert audio_path(corpus.cut(0)) == str(path)
