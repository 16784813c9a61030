"""Indexed manifests: random access, several as one corpus, and indexes that cannot be used."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet
from numpy.typing import NDArray

from tests.helpers.audio import SmallCorpus, cut_of, tone, write_audio, write_manifest
from w2vscale.corpora.index import build_index
from w2vscale.data.cuts import NotACut
from w2vscale.data.manifest import INDEX_DTYPE, Corpus, Manifest, audio_path, index_path
from w2vscale.errors import UserError


def copy_of(corpus: SmallCorpus, folder: Path) -> Path:
    return Path(shutil.copy(corpus.train, folder / "cuts.jsonl"))


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        Manifest(path)
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
    def test_a_line_that_changed_since_it_was_indexed_is_named_when_it_is_read(
        self, small_corpus: SmallCorpus, tmp_path: Path
    ) -> None:
        path = copy_of(small_corpus, tmp_path)
        build_index(path)
        text = path.read_text()
        for old, new, reason in (
            ('"start"', '"stars"', "MonoCut.start: Field required"),
            ('"duration": 1.0', '"duration": 2.0', "it lasts 2 s, unlike when it was indexed"),
        ):
            path.write_text(text.replace(old, new, 1))
            with pytest.raises(NotACut, match=f"{path}: utterance 1 is not a Lhotse cut of a recording: {reason}"):
                Manifest(path).cut(0)

    def test_a_missing_index_with_the_command_that_makes_it(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        assert error_of(path) == f"{path}: has no index; create it with: w2vscale data index {path}"

    def test_an_index_of_another_version_of_the_manifest(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        build_index(path)
        path.write_text(path.read_text() * 2)
        command = f"w2vscale data index {path}"
        assert error_of(path) == f"{path}: changed since it was indexed; update its index with: {command}"

    @pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY", b"PK\x03\x04"])
    def test_an_index_that_is_none(self, content: bytes, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        index_path(path).write_bytes(content)
        message = error_of(path)
        assert message.startswith(f"{index_path(path)}: not an index") and "w2vscale data index" in message

    def test_an_index_that_was_cut_off(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        build_index(path)
        content = index_path(path).read_bytes()
        index_path(path).write_bytes(content[: len(content) // 2])
        assert error_of(path).startswith(f"{index_path(path)}: not an index")

    @pytest.mark.parametrize(
        "content",
        [np.zeros(3), np.zeros(0, INDEX_DTYPE), np.zeros(25, [("offset", "<i8"), ("duration", "<f8")])],
        ids=["other numbers", "nothing", "an older version's"],
    )
    def test_an_index_of_something_else_until_it_is_remade(
        self, content: NDArray[np.void], small_corpus: SmallCorpus, tmp_path: Path
    ) -> None:
        path = copy_of(small_corpus, tmp_path)
        np.save(index_path(path), content)
        assert error_of(path).endswith(f"replace it with: w2vscale data index {path}")
        assert build_index(path) == len(Manifest(path)) == 24


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
