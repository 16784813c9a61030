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
from numpy.typing import NDArray

from tests.helpers.audio import SmallCorpus, cut_of, noise, tone, write_audio, write_manifest
from w2vscale.data.manifest import INDEX_DTYPE, MAX_LANGUAGES, Corpus, Manifest, audio_path, build_index, index_path
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


def line_of(number: int, *, language: str | None = None) -> str:
    """A cut of `number` + 1 milliseconds."""
    supervision = {"id": "s", "recording_id": "a", "start": 0.0, "duration": 3.0, "channel": 0, "text": 'zwölf {"}'}
    if language is not None:
        supervision["language"] = language
    return json.dumps(
        {**LINE, "id": f"u{number}", "duration": (number + 1) / 1000, "supervisions": [supervision]},
        ensure_ascii=number % 2 == 0,
    )


def index_after(path: Path, *, jobs: int = 1) -> tuple[bytes, list[int]]:
    """The index, and where progress stood each time it was reported."""
    seen: list[int] = []
    build_index(path, lambda done, total: seen.append(done), jobs=jobs)
    return index_path(path).read_bytes(), seen


def index_from_nothing(path: Path) -> bytes:
    index_path(path).unlink()
    return index_after(path)[0]


def error_of(path: Path, *, index: bool = True, jobs: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        build_index(path, jobs=jobs) if index else Manifest(path)
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


class TestLanguages:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        lines = [line_of(0, language="de"), line_of(1), line_of(2, language="sw"), line_of(3, language="de")]
        lines.append(json.dumps({**LINE, "custom": {"language": "sw"}}))
        lines.append(json.dumps({**json.loads(line_of(5, language="fr")), "custom": {"language": "de"}}))
        lines.append(json.dumps({**LINE, "custom": {"snr": 3.0}, "supervisions": []}))
        path = tmp_path / "cuts.jsonl"
        path.write_text("\n".join(lines) + "\n")
        build_index(path)
        return path

    def test_are_numbered_in_order_of_first_appearance(self, path: Path) -> None:
        codes, names = Manifest(path).languages()
        assert codes.dtype == np.uint16
        assert names == ["de", "", "sw", "fr"]
        assert [names[code] for code in codes] == ["de", "", "sw", "de", "sw", "fr", ""]

    def test_none_is_one_of_them(self, small_corpus: SmallCorpus) -> None:
        codes, names = Manifest(small_corpus.train).languages()
        assert (set(codes.tolist()), names) == ({0}, [""])

    def test_too_many(self, tmp_path: Path) -> None:
        path = tmp_path / "cuts.jsonl"
        lines = [json.dumps({**LINE, "custom": {"language": number}}) + "\n" for number in range(MAX_LANGUAGES + 1)]
        path.write_text("".join(lines))
        assert error_of(path) == f"{path}: has more than {MAX_LANGUAGES} languages, the most that an index holds"
        path.write_text("".join(lines[:-1]))
        assert build_index(path) == MAX_LANGUAGES


class TestProcesses:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """300 cuts in 5 languages, later ones in the later part, with blank lines between."""
        languages = ["de", "sw", None, "fr", "cy"]
        lines = [line_of(n, language=languages[(n * 7) % (1 + n // 60)]) for n in range(300)]
        path = tmp_path / "cuts.jsonl"
        path.write_text("".join(line + "\n" * (1 + n % 3) for n, line in enumerate(lines)), encoding="utf-8")
        return path

    def test_any_number_of_them_writes_the_same_bytes(self, path: Path) -> None:
        expected, _ = index_after(path)
        for jobs in (2, 3, 5):
            index_path(path).unlink()
            assert index_after(path, jobs=jobs)[0] == expected
        manifest = Manifest(path)
        assert [manifest.cut(number).id for number in range(300)] == [f"u{number}" for number in range(300)]
        assert manifest.durations.tolist() == [(number + 1) / 1000 for number in range(300)]
        codes, names = manifest.languages()
        assert names[:2] == ["de", "sw"] and len(names) == 5
        assert [names[code] for code in codes] == [
            manifest.cut(number).supervisions[0].language or "" for number in range(300)
        ]

    @pytest.mark.parametrize("size", [17, 300, 301, 1024, 99_999])
    def test_any_ranges_give_the_same_bytes(self, size: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected, _ = index_after(path)
        index_path(path).unlink()
        monkeypatch.setattr("w2vscale.data.manifest.RANGE_BYTES", size)
        assert index_after(path)[0] == expected

    def test_a_damaged_line_has_its_number_in_the_file(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number in (len(lines) - 1, len(lines) // 2):
            while not lines[number]:
                number -= 1
            lines[number] = lines[number][:-1]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            assert error_of(path, jobs=3).startswith(f"{path}: line {number + 1} is not a Lhotse cut")


class TestManifestsThatGrow:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "cuts.jsonl"
        path.write_text("".join(line_of(number, language="de") + "\n" for number in range(20)), encoding="utf-8")
        build_index(path)
        return path

    def append(self, path: Path, text: str) -> None:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(text)

    @pytest.mark.parametrize("jobs", [1, 3])
    def test_only_new_lines_are_parsed(self, jobs: int, path: Path) -> None:
        before = path.stat().st_size
        for number, language in enumerate(("sw", "de", None, "sw"), start=20):
            self.append(path, line_of(number, language=language) + "\n")
        index, seen = index_after(path, jobs=jobs)
        assert (seen[0], seen[-1]) == (before, path.stat().st_size)
        codes, names = Manifest(path).languages()
        assert (codes.tolist(), names) == ([0] * 20 + [1, 0, 2, 1], ["de", "sw", ""])
        assert index == index_from_nothing(path)

    def test_one_that_did_not_is_not_parsed_at_all(self, path: Path) -> None:
        written = index_path(path).stat()
        size = path.stat().st_size
        assert index_after(path)[1] == [size]
        assert index_path(path).stat().st_mtime_ns == written.st_mtime_ns

    @pytest.mark.parametrize("number", [0, 7, 19])
    @pytest.mark.parametrize("more", [line_of(20) + "\n", ""], ids=["and grew", "and did not"])
    def test_all_is_parsed_where_an_old_line_changed(self, number: int, more: str, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[number] = lines[number].replace('"duration": 0.0', '"duration": 0.9')
        path.write_text("\n".join(lines) + "\n" + more, encoding="utf-8")
        index, seen = index_after(path)
        assert seen[0] == 0
        assert Manifest(path).durations[number] == pytest.approx(0.9 + (number + 1) / 1000)
        assert index == index_from_nothing(path)

    def test_all_is_parsed_where_the_last_line_went_on(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])
        build_index(path)
        self.append(path, "\n" + line_of(20) + "\n")
        index, seen = index_after(path)
        assert seen[0] == 0 and len(Manifest(path)) == 21
        assert index == index_from_nothing(path)

    def test_all_is_parsed_where_lines_went(self, path: Path) -> None:
        path.write_text("".join(line_of(number) + "\n" for number in range(5)), encoding="utf-8")
        assert index_after(path)[1][0] == 0
        assert len(Manifest(path)) == 5

    def test_a_new_line_that_is_no_cut_has_its_number_and_leaves_the_index(self, path: Path) -> None:
        index = index_path(path).read_bytes()
        self.append(path, line_of(20) + "\n{}\n")
        assert error_of(path, jobs=2).startswith(f"{path}: line 22 is not a Lhotse cut")
        assert index_path(path).read_bytes() == index


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
            json.dumps(LINE) + json.dumps(LINE),
            json.dumps({**LINE, "duration": 10**400}),
            json.dumps({**LINE, "supervisions": ["text"]}),
            "[" * 100_000,
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
        assert sorted(tmp_path.iterdir()) == [path, index_path(path)]

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
        assert error_of(path, index=False).endswith(f"remake with: w2vscale data index {path}")
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
