"""Manifests of LibriSpeech: all parts with transcripts and speakers, and user errors."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.corpora.test_folder import cuts_of, error_of
from tests.helpers.audio import noise, write_audio, write_text
from w2vscale.corpora.librispeech import prepare_librispeech
from w2vscale.corpora.validate import validate_manifest


def write_librispeech(root: Path, parts: tuple[str, ...]) -> Path:
    """Two speakers a part, two utterances each, as LibriSpeech is laid out."""
    for first, part in enumerate(parts, start=1):
        for speaker in (10 * first, 10 * first + 1):
            folder = root / "LibriSpeech" / part / str(speaker) / "7"
            names = [f"{speaker}-7-{number:04d}" for number in range(2)]
            for number, name in enumerate(names):
                write_audio(folder / f"{name}.flac", noise(1.5 + number, seed=speaker + number))
            text = "".join(f"{name} WORDS OF {number}\n" for number, name in enumerate(names))
            (folder / f"{speaker}-7.trans.txt").write_text(text)
    return root / "LibriSpeech"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_librispeech(tmp_path_factory.mktemp("corpus"), ("train-clean-5", "dev-clean-2", "test-other"))


class TestLibriSpeech:
    def test_each_part_is_a_manifest_of_its_utterances(self, corpus: Path, tmp_path: Path) -> None:
        written = prepare_librispeech(corpus, tmp_path / "new" / "folder")
        assert {manifest.path.name for manifest in written} == {
            "cuts_train-clean-5.jsonl",
            "cuts_dev-clean-2.jsonl",
            "cuts_test-other.jsonl",
        }
        assert {manifest.utterances for manifest in written} == {4}
        for manifest in written:
            assert manifest.hours == pytest.approx(8.0 / 3600)
            cuts = cuts_of(manifest)
            assert list(cuts) == sorted(cuts)
            assert validate_manifest(manifest.path).bad == 0

    def test_transcripts_and_speakers_are_kept(self, corpus: Path, tmp_path: Path) -> None:
        (written,) = prepare_librispeech(corpus, tmp_path, parts=["dev-clean-2"])
        cut = cuts_of(written)["20-7-0001"]
        assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("WORDS OF 1", "20")
        assert (cut.sampling_rate, cut.duration) == (16_000, 2.5)

    def test_mini_takes_its_two_parts_only(self, corpus: Path, tmp_path: Path) -> None:
        written = prepare_librispeech(corpus, tmp_path, mini=True)
        assert [manifest.path.name for manifest in written] == ["cuts_dev-clean-2.jsonl", "cuts_train-clean-5.jsonl"]

    def test_the_root_logger_keeps_its_level(
        self, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            prepare_librispeech(corpus, tmp_path, parts=["test-other"])
            assert logging.getLogger().level == logging.INFO

    def test_the_folder_above_librispeech_will_do(self, corpus: Path, tmp_path: Path) -> None:
        (written,) = prepare_librispeech(corpus.parent, tmp_path, parts=["test-other"])
        assert written.utterances == 4

    def test_several_jobs_write_the_same(self, corpus: Path, tmp_path: Path) -> None:
        found = [
            prepare_librispeech(corpus, tmp_path / str(jobs), parts=["test-other"], jobs=jobs)[0] for jobs in (1, 2)
        ]
        assert found[0].path.read_bytes() == found[1].path.read_bytes()

    def test_a_missing_folder_and_an_unknown_or_absent_part_are_named(self, corpus: Path, tmp_path: Path) -> None:
        assert error_of(prepare_librispeech, tmp_path / "no", tmp_path) == f"{tmp_path / 'no'}: no such folder"
        assert "--part train-clean-7: not a part" in error_of(
            prepare_librispeech, corpus, tmp_path, parts=["train-clean-7"]
        )
        assert error_of(prepare_librispeech, corpus, tmp_path, parts=["dev-other"]) == (
            f"{corpus / 'dev-other'}: no such folder"
        )
        assert "not a part" in error_of(prepare_librispeech, corpus, tmp_path, parts=["test-other"], mini=True)

    def test_a_folder_without_any_part_says_what_was_looked_for(self, tmp_path: Path) -> None:
        message = error_of(prepare_librispeech, tmp_path, tmp_path / "out", mini=True)
        assert message == f"{tmp_path}: contains no part of the corpus (looked for dev-clean-2, train-clean-5)"

    def test_a_part_without_utterances_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "dev-clean-2").mkdir()
        message = error_of(prepare_librispeech, tmp_path, tmp_path / "out")
        assert message.startswith(f"{tmp_path / 'dev-clean-2'}: no usable utterance with a transcript")

    def test_a_text_file_named_flac_is_named(self, tmp_path: Path) -> None:
        corpus = write_librispeech(tmp_path, ("dev-clean-2",))
        bad = write_text(corpus / "dev-clean-2" / "10" / "7" / "10-7-0001.flac")
        assert error_of(prepare_librispeech, corpus, tmp_path / "out") == (
            f"{bad}: not readable as audio: Format not recognised"
        )

    def test_an_output_that_cannot_be_written_is_named(self, corpus: Path, tmp_path: Path) -> None:
        blocked = write_text(tmp_path / "file")
        message = error_of(prepare_librispeech, corpus, blocked, parts=["test-other"])
        assert message.startswith(f"{blocked / 'cuts_test-other.jsonl'}: cannot be written: ")

    def test_real_speech_gives_its_published_counts(self, shared_data: Path, tmp_path: Path) -> None:
        written = prepare_librispeech(shared_data / "LibriSpeech", tmp_path, mini=True)
        found = {manifest.path.stem: (manifest.utterances, round(60 * manifest.hours, 1)) for manifest in written}
        assert found == {"cuts_train-clean-5": (150, 31.0), "cuts_dev-clean-2": (58, 11.7)}
        assert all(cut.supervisions[0].text for cut in cuts_of(written[0]).values())
