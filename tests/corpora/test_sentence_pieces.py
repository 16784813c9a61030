"""Sentence pieces: training from transcripts, the vocabulary that they give, and labels equal to SentencePiece's."""

from __future__ import annotations

import builtins
import json
import unicodedata
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from lhotse import SupervisionSegment
from typer.testing import CliRunner

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.character_model import TEXTS as CHARACTER_TEXTS
from tests.helpers.character_model import train_characters
from w2vscale.cli.app import app
from w2vscale.config import dump_config, load_config
from w2vscale.data.audio import AudioError
from w2vscale.data.transcripts import Transcripts, labels_to_text
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective, resolve
from w2vscale.objectives.ctc import CtcSettings

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = ["the cat sat on the mat", "it's  a dog", "the dog and the cat", "a mat on a dog", "", "that is it"]
MARKS = ["<pad>", "<unk>", "<s>", "</s>"]


def write_transcripts(folder: Path, texts: Sequence[str]) -> Path:
    audio = write_audio(folder / "audio.flac", noise(0.5))
    cuts = []
    for number, text in enumerate(texts):
        cut = cut_of(audio, identifier=f"u{number}")
        cut.id = f"u{number}"
        cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0.0, cut.duration, text=text)]
        cuts.append(cut)
    return write_manifest(folder / "cuts.jsonl", cuts)


def data_pieces(*arguments: Path | str) -> str:
    """What `w2vscale data pieces` prints, or its error."""
    result = CliRunner().invoke(app, ["data", "pieces", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transcripts(tmp_path_factory.mktemp("transcripts"), TEXTS)


@pytest.fixture(scope="module")
def model(manifest: Path) -> Path:
    path = manifest.parent / "pieces.model"
    assert data_pieces(manifest, "--output", path, "--size", "24") == f"{path}: 24 pieces from 5 transcripts\n"
    return path


@pytest.fixture(scope="module")
def library(model: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def vocabulary(model: Path) -> list[str]:
    return list(with_pieces("base", model).vocabulary)


def with_pieces(preset: str, model: Path, *overrides: str) -> CtcSettings:
    """Settings of CTC, with the vocabulary that they give."""
    config = load_config(preset, ["objective.name=ctc", f"objective.sentencepiece={model}", *overrides])
    settings: CtcSettings = build_objective(config).settings
    return settings


class TestTraining:
    def test_the_same_transcripts_give_the_same_file(self, manifest: Path, model: Path, tmp_path: Path) -> None:
        data_pieces(manifest, "-o", tmp_path / "new" / "again.model", "--size", "24")
        assert (tmp_path / "new" / "again.model").read_bytes() == model.read_bytes()

    def test_all_characters_are_pieces_whatever_the_length(self, tmp_path: Path) -> None:
        manifest = write_transcripts(tmp_path, ["ｆｕｌｌ width", "é" + " of" * 5000])
        data_pieces(manifest, "-o", tmp_path / "m", "--size", "16")
        assert {*"ｆｕｌwidthéof", "▁"} < set(vocabulary(tmp_path / "m"))

    def test_errors(self, manifest: Path, model: Path, tmp_path: Path) -> None:
        new = tmp_path / "new.model"
        assert data_pieces(manifest, "-o", model) == f"{model}: exists; choose another name"
        most = data_pieces(manifest, "-o", new)
        assert most.startswith("--size 500: the transcripts allow at most ")
        size = int(most.split()[-2])
        assert "at most" in data_pieces(manifest, "-o", new, "--size", f"{size + 1}")
        assert not new.exists()
        assert f"{size} pieces" in data_pieces(manifest, "-o", new, "--size", f"{size}")
        characters = {*"".join(TEXTS).replace(" ", "▁")}
        assert data_pieces(manifest, "-o", tmp_path / "few", "--size", "5") == (
            f"--size 5: too small for the characters of the transcripts; choose at least {len(characters) + 3}"
        )
        silent = write_transcripts(tmp_path / "silent", ["", " "])
        assert data_pieces(silent, "-o", tmp_path / "none") == f"{silent}: no transcripts"
        unwritable = data_pieces(manifest, "-o", silent / "x.model", "--size", "24")
        assert unwritable.startswith(f"{silent}/x.model: cannot be written: ")
        assert "no.jsonl" in data_pieces(tmp_path / "no.jsonl", "-o", tmp_path / "none")


class TestVocabulary:
    def test_it_is_the_blank_and_the_pieces(self, model: Path, library: Any) -> None:
        found = vocabulary(model)
        assert found[:4] == MARKS and len(found) == 25
        assert all(found[number + 1] == library.id_to_piece(number) for number in range(24))

    def test_the_settings_of_a_run_open_without_the_file(self, model: Path, tmp_path: Path) -> None:
        moved = tmp_path / "moved.model"
        moved.write_bytes(model.read_bytes())
        config, objective = resolve(load_config("base", ["objective.name=ctc", f"objective.sentencepiece={moved}"]))
        (tmp_path / "config.yaml").write_text(dump_config(config))
        moved.unlink()
        again, opened = resolve(load_config(tmp_path / "config.yaml"))
        assert again == config and opened.vocabulary == objective.vocabulary
        spelling = Transcripts(opened.vocabulary)
        assert spelling.normalised("A  Cat") == "a cat"

    def test_its_path_is_stored_as_absolute(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model.parent)
        overrides = ["objective.name=ctc", f"objective.sentencepiece={model.name}"]
        config, objective = resolve(load_config("base", overrides))
        assert config.objective.model_dump()["sentencepiece"] == model
        monkeypatch.chdir("/")
        assert objective.transcripts.labels("a")[0]

    def test_an_unusable_file_is_an_error_that_names_it(self, manifest: Path, model: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        (tmp_path / "cut").write_bytes(model.read_bytes()[:100])
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "bytes"), vocab_size=290, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        for path, message in (
            (tmp_path / "no.model", "cannot be read: No such file"),
            (tmp_path, "cannot be read: Is a directory"),
            (manifest, "not a SentencePiece model"),
            (tmp_path / "empty", "not a SentencePiece model"),
            (tmp_path / "cut", "not a SentencePiece model"),
            (tmp_path / "bytes.model", "has pieces for bytes"),
        ):
            for use in (vocabulary, lambda path: Transcripts(["<pad>", "a"], path)):
                with pytest.raises(UserError, match=rf"objective\.sentencepiece={path}: {message}"):
                    use(path)

    def test_a_vocabulary_of_other_symbols_is_an_error(self, model: Path) -> None:
        letters = with_pieces("ctc_1h", model)
        with pytest.raises(UserError, match=r"its 24 pieces after a blank are not the 32 symbols of objective\.voc"):
            Transcripts(letters.vocabulary, letters.sentencepiece)
        pieces = with_pieces("ctc_1h", model, "objective.vocabulary=[]")
        assert Transcripts(pieces.vocabulary, pieces.sentencepiece).labels("a")[0]

    def test_sentencepiece_is_optional(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        imported = builtins.__import__

        def refuse(name: str, scope: Mapping[str, object] | None = None, *rest: Any) -> Any:
            if name == "sentencepiece":
                raise ImportError
            return imported(name, scope, *rest)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(UserError, match=r"pip install 'w2vscale\[decode\]'"):
            vocabulary(model)


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_characters(tmp_path_factory.mktemp("characters") / "tokenizer.model")


class TestCharacters:
    """Models in which piece 0 is a control symbol: it is the blank, and labels are the ids of the model."""

    def test_the_vocabulary_is_the_pieces(self, characters: Path) -> None:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(characters))
        settings = with_pieces("ctc_1h", characters, "objective.vocabulary=[]")
        assert settings.vocabulary == pieces.id_to_piece(list(range(len(pieces))))
        assert settings.vocabulary[:4] == ["<s>", "<pad>", "</s>", "<unk>"]

    @pytest.mark.parametrize("text", [*CHARACTER_TEXTS, "  the   cat ", "nai\u0308ve cafe\u0301", "the ☃ cat", "ﬁt"])
    def test_labels_and_text_are_sentencepieces(self, characters: Path, text: str) -> None:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(characters))
        vocabulary = pieces.id_to_piece(list(range(len(pieces))))
        labels, unknown = Transcripts(vocabulary, characters).labels(text)
        assert labels == pieces.encode(unicodedata.normalize("NFC", " ".join(text.split())))
        assert 0 not in labels and unknown == "☃" * ("☃" in text)
        if not unknown:
            assert labels_to_text(labels, vocabulary) == unicodedata.normalize("NFC", pieces.decode(labels))

    @pytest.mark.parametrize("text", CHARACTER_TEXTS)
    def test_without_the_model_labels_lack_only_the_space_that_it_puts_before_a_text(
        self, characters: Path, text: str
    ) -> None:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(characters))
        vocabulary = pieces.id_to_piece(list(range(len(pieces))))
        space = vocabulary.index("▁")
        assert [space, *Transcripts(vocabulary).labels(text)[0]] == pieces.encode(text)

    def test_a_vocabulary_with_another_blank_before_its_pieces_fits_too(self, characters: Path, tmp_path: Path) -> None:
        """Checkpoints of earlier versions have it."""
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(characters))
        shifted = ["<pad>", *pieces.id_to_piece(list(range(len(pieces))))]
        assert Transcripts(shifted, characters).labels("a cat")[0] == [1 + label for label in pieces.encode("a cat")]


class TestLabels:
    @pytest.mark.parametrize("text", [*filter(None, TEXTS), "a that's  the dat", "t"])
    def test_they_equal_those_of_the_library_and_spell_the_text(self, model: Path, library: Any, text: str) -> None:
        symbols = vocabulary(model)
        labels, unknown = Transcripts(symbols, model).labels(text)
        assert labels == [number + 1 for number in library.encode(text)] and unknown == ""
        assert "".join(symbols[label] for label in labels).replace("▁", " ").strip() == " ".join(text.split())

    def test_case_follows_the_pieces(self, model: Path) -> None:
        spelling = Transcripts(vocabulary(model), model)
        assert spelling.labels("THE Cat") == spelling.labels("the cat")
        assert Transcripts(["<pad>", "<unk>", "▁THE", "CAT"]).normalised("the cat") == "THE CAT"
        # Letters that occur in one case are converted to it, one by one, and those in both stay.
        assert Transcripts(["<pad>", "<unk>", "▁The", "C"]).normalised("the Cat") == "The CaT"
        assert Transcripts(["<pad>", "<unk>", "▁The", "▁t", "C", "c", "a"]).normalised("the Cat") == "the Cat"

    @pytest.mark.parametrize("form", ["NFC", "NFD"])
    def test_pieces_of_any_normal_form_spell_texts_of_any(self, tmp_path: Path, form: Any) -> None:
        texts = ["été à la plage", "les élèves goûtent", "la crème"]
        path = tmp_path / "pieces.model"
        written = [unicodedata.normalize(form, text) for text in texts]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(written), model_writer=(io := BytesIO()),
            vocab_size=30, hard_vocab_limit=False, normalization_rule_name="identity", minloglevel=2,
        )  # fmt: skip
        path.write_bytes(io.getvalue())
        symbols = vocabulary(path)
        overrides = [f"objective.vocabulary={json.dumps(symbols)}", f"objective.sentencepiece={path}"]
        assert with_pieces("ctc_1h", path, *overrides).vocabulary == symbols
        spelling = Transcripts(symbols, path)
        for text in texts:
            found = [spelling.labels(unicodedata.normalize(other, text.upper())) for other in ("NFC", "NFD")]
            assert found[0] == found[1] and not found[0][1]
            assert labels_to_text(found[0][0], symbols) == text == spelling.normalised(text)

    def test_characters_in_no_piece_become_unknown_and_are_reported(self, model: Path, library: Any) -> None:
        labels, unknown = Transcripts(vocabulary(model), model).labels("the?! cät")
        assert labels == [number + 1 for number in library.encode("the?! cät")]
        assert labels.count(MARKS.index("<unk>")) == 2 and unknown == "!?ä"

    def test_an_empty_text_has_none(self, model: Path) -> None:
        with pytest.raises(AudioError, match="has no transcript"):
            Transcripts(vocabulary(model), model).labels(" ")
