"""Building the index of a manifest: any line format, any number of processes, manifests that grow, user errors."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lhotse.cut import PaddingCut

from tests.helpers.audio import SmallCorpus, noise, write_audio
from w2vscale.corpora.index import MAX_LANGUAGES, build_index
from w2vscale.data.manifest import Manifest, index_path
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


def error_of(path: Path, *, jobs: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        build_index(path, jobs=jobs)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestOneFile:
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
        assert error_of(path) == f"{path}: has more than {MAX_LANGUAGES} languages, the most that an index can hold"
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
        monkeypatch.setattr("w2vscale.corpora.index.RANGE_BYTES", size)
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
        assert error_of(tmp_path).startswith(f"{tmp_path}: a folder, not a manifest; make one with: w2vscale data")

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

    def test_a_folder_that_cannot_be_written(self, small_corpus: SmallCorpus, tmp_path: Path) -> None:
        path = copy_of(small_corpus, tmp_path)
        index_path(path).mkdir()  # a folder in the index's place: this fails for root as well
        assert error_of(path).startswith(f"{index_path(path)}: cannot be written: ")
        assert sorted(tmp_path.iterdir()) == [path, index_path(path)]
