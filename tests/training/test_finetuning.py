"""Fine-tuning with CTC: it learns, resumes, freezes the right parameters, and reports unusable transcripts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest
import torch
from lhotse import CutSet
from typer.testing import CliRunner

from tests.helpers.audio import write_manifest
from tests.helpers.exported import random_model, save_model
from tests.helpers.micro import MICRO_RUN
from tests.helpers.spelled import SPELLED, SPELLING, some_texts, write_spelled
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.cli.app import app
from w2vscale.config import Config, load_config
from w2vscale.corpora.index import build_index
from w2vscale.corpora.sentence_pieces import train_pieces
from w2vscale.errors import UserError
from w2vscale.evaluation.results import find_results
from w2vscale.evaluation.validation import evaluate_checkpoint
from w2vscale.evaluation.wer import score_checkpoint
from w2vscale.files import read_log, read_metrics
from w2vscale.inference.pretrained import load
from w2vscale.inference.transcription import Transcript, transcribe
from w2vscale.inference.utterances import find_utterances
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.training import run as run_module
from w2vscale.training.dry_run import dry_run
from w2vscale.training.train import train
from w2vscale.training.warm_start import fine_tuning_config


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_spelled(tmp_path_factory.mktemp("spelled"), some_texts(10))


def settings(manifest: Path, *overrides: str) -> Config:
    return load_config("base", [*SPELLING, f"data.train={manifest}", *overrides])


@pytest.fixture(scope="module")
def pretrained(spelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pretraining of a few updates."""
    exp = tmp_path_factory.mktemp("pretrained")
    config = load_config("base", [*MICRO_RUN, *SPELLED, f"data.train={spelled}", "trainer.updates=4"])
    assert train(config, exp) == 0
    return exp


@pytest.fixture(scope="module")
def memorised(spelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned its ten utterances."""
    exp = tmp_path_factory.mktemp("memorised")
    config = settings(
        spelled, f"data.validation={spelled}", "trainer.updates=200", "trainer.validate_every=100",
        "optim.lr=6e-3", "schedule.warmup_updates=20", "batch.max_seconds=30", "batch.micro_batches=1",
        "logging.every=50", "regularization.feature_grad_mult=1", "model.norm_first=true", "model.embedding_norm=false",
        "regularization.layerdrop=0", "regularization.dropout=0", "regularization.attention_dropout=0",
        "regularization.input_dropout=0", "objective.mask_probability=0.001",
    )  # fmt: skip
    assert train(config, exp) == 0
    return exp


def test_ten_utterances_are_memorised(spelled: Path, memorised: Path) -> None:
    curve = read_metrics(memorised / "metrics.jsonl", "validation")
    assert curve[-1]["label_error_rate"] == 0.0
    assert curve[-1]["loss"] < 0.05
    found = evaluate_checkpoint(memorised, [spelled])
    assert found is not None
    assert (found.metrics["label_error_rate"], found.metrics["utterances"]) == (0.0, 10)
    assert found.metrics["loss"] == pytest.approx(curve[-1]["loss"])


def test_a_report_draws_its_curves(memorised: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(memorised), "-o", str(tmp_path / "report.html")])
    assert result.exit_code == 0, result.output
    assert "label errors" in result.output and "0.0%  0.0%" in result.output
    assert "word error rate, validation" in (tmp_path / "report.html").read_text()


def test_they_are_transcribed(spelled: Path, memorised: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.flac").write_text("not audio")
    command = ["transcribe", str(memorised), str(spelled), str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError)
    assert "not readable as audio" in str(result.exception) and "1 of 11 utterances" in str(result.exception)
    found = dict(line.split("\t") for line in result.stdout.splitlines())
    assert found == {f"u{number:02d}": text for number, text in enumerate(some_texts(10))}
    as_json = CliRunner().invoke(
        app, ["transcribe", str(memorised), str(spelled.parent / "u03.flac"), "--format", "json"]
    )
    document = json.loads(as_json.stdout)
    assert document["text"] == some_texts(10)[3] == " ".join(word["word"] for word in document["words"])


def test_their_words_have_the_times_at_which_they_are_spoken(spelled: Path, memorised: Path, tmp_path: Path) -> None:
    """Each letter and space takes a tenth of a second."""
    lines = CliRunner().invoke(app, ["transcribe", str(memorised), str(spelled), "--format", "ctm"]).stdout.splitlines()
    assert len(lines) == 20
    for number, text in enumerate(some_texts(10)):
        place = 0
        for line, word in zip(lines[2 * number : 2 * number + 2], text.split(), strict=True):
            recording, channel, start, duration, found, score = line.split()
            assert (recording, channel, found) == (f"u{number:02d}", "1", word) and 0.3 < float(score) <= 1.0
            assert abs(float(start) - place / 10) < 0.15
            assert abs(float(start) + float(duration) - (place + len(word)) / 10) < 0.15
            place += len(word) + 1
    command = ["transcribe", str(memorised), str(spelled), "--format", "srt", "-o", str(tmp_path / "srt")]
    assert CliRunner().invoke(app, command).exit_code == 0
    files = sorted((tmp_path / "srt").iterdir())
    assert [file.name for file in files] == [f"u{number:02d}.srt" for number in range(10)]
    assert [file.read_text().splitlines()[2] for file in files] == some_texts(10)
    one = CliRunner().invoke(app, ["transcribe", str(memorised), str(spelled.parent / "u03.flac"), "--format", "srt"])
    assert one.stdout == files[3].read_text()


def test_word_errors_of_memorised_utterances(spelled: Path, memorised: Path, tmp_path: Path) -> None:
    manifest = write_spelled(tmp_path / "other", [*some_texts(9), "ABCD ABCD", ""])
    command = ["evaluate", str(memorised), "--cuts", str(manifest), "--wer", "-o", str(tmp_path / "wer.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "wer.json").read_text())
    assert document["words"]["reference"] == 20 and document["wer"] <= 0.1
    assert document["update"] == 200
    assert [bad["kind"] for bad in document["bad"]] == ["no transcript"]
    assert "WER" in result.output and "utterances, 1 skipped" in result.output
    assert "skipped (no transcript): 1, the first one: u10 (" in result.output
    assert [len(found) for found in find_results(tmp_path)] == [1, 1, 0]
    (tmp_path / "other" / "u10.flac").unlink()  # an utterance without a transcript is not decoded
    assert "utterances, 1 skipped" in CliRunner().invoke(app, command).output
    twice = CliRunner().invoke(app, [*command, "--cuts", str(manifest)])
    assert isinstance(twice.exception, UserError) and "the id 'u00' occurs twice" in str(twice.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wer", "data.workers=1"], "data.workers=1: settings cannot be overridden with --wer"),
        (["--beam", "5"], "--beam: only applies to error rates; add --wer"),
        (["--word-score", "0"], "--word-score: only applies to error rates"),
        (["--worst", "1"], "--worst: only applies to error rates"),
    ],
)
def test_options_of_evaluate_without_an_effect_are_refused(
    spelled: Path, memorised: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(memorised), "--cuts", str(spelled), *arguments])
    assert isinstance(result.exception, UserError) and message in str(result.exception)


def test_only_transcripts_go_to_stdout(spelled: Path, memorised: Path, tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    words = {word for text in some_texts(10) for word in text.split()}
    (tmp_path / "words.txt").write_text("\n".join([*sorted(words), "XYZ"]))
    command = ["transcribe", str(memorised), str(spelled), "--lexicon", str(tmp_path / "words.txt")]
    result = CliRunner().invoke(app, command)
    assert len(result.stdout.splitlines()) == 10
    assert "skipping 1 words that the vocabulary cannot spell" in result.stderr


def test_a_head_for_another_vocabulary_is_not_loaded_silently(spelled: Path, memorised: Path, tmp_path: Path) -> None:
    other = (
        "objective.vocabulary=['<pad>', '|', D, C, B, A]",
        f"trainer.init_from={memorised}",
        "trainer.updates=4",
    )
    config = fine_tuning_config(settings(spelled, *other))
    with pytest.raises(UserError, match=r"head.weight is for another objective.vocabulary there.* trainer.init_allow"):
        train(config, tmp_path / "refused")
    allowed = fine_tuning_config(settings(spelled, *other, "trainer.init_allow=['head']", "optim.lr=1e-9"))
    assert train(allowed, tmp_path / "allowed") == 0
    theirs, ours = (whole(open_checkpoint(path).model_tensors()) for path in (memorised, tmp_path / "allowed"))
    assert not torch.allclose(theirs["head.weight"], ours["head.weight"], atol=1e-2)
    name = "encoder.transformer.blocks.0.attention.qkv.weight"
    assert torch.allclose(theirs[name], ours[name], atol=1e-4)


def test_a_pretrained_model_does_not_transcribe(pretrained: Path, spelled: Path) -> None:
    result = CliRunner().invoke(app, ["transcribe", str(pretrained), str(spelled)])
    assert isinstance(result.exception, UserError) and "fine-tune it first: w2vscale finetune" in str(result.exception)


def test_resuming_is_bit_identical(spelled: Path, pretrained: Path, tmp_path: Path) -> None:
    run = ("trainer.updates=8", "checkpoint.every=4", f"trainer.init_from={pretrained}")
    freezing = (
        "objective.freeze_encoder_updates=3",
        "objective.channel_mask_probability=0.5",
        "objective.channel_mask_length=4",
    )
    config = fine_tuning_config(settings(spelled, *run, *freezing))
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut")
    newest = tmp_path / "cut" / "checkpoints" / "update_00000008"
    newest.rename(tmp_path / "away")
    train(config, tmp_path / "cut")
    one, other = (whole(open_checkpoint(tmp_path / name).model_tensors()) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    curves = [read_metrics(tmp_path / name / "metrics.jsonl", "train") for name in ("whole", "cut")]
    assert [record["loss"] for record in curves[0]] == [record["loss"] for record in curves[1]]
    assert [record["encoder_frozen"] for record in curves[0]] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_sentence_pieces_train_and_resume_and_only_labels_need_the_model(spelled: Path, tmp_path: Path) -> None:
    pieces = tmp_path / "pieces.model"
    train_pieces([spelled], pieces, size=14)
    own = (
        "objective.vocabulary=[]",
        f"objective.sentencepiece={pieces}",
        "trainer.updates=4",
        "checkpoint.every=2",
    )
    config = settings(spelled, *own, "batch.micro_batches=1", "data.workers=1")
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "update_00000004").rename(tmp_path / "away")
    train(config, tmp_path / "cut")
    one, other = (whole(open_checkpoint(tmp_path / name).model_tensors()) for name in ("whole", "cut"))
    assert one["head.weight"].shape[0] == 15
    assert all(torch.equal(one[name], other[name]) for name in one)
    evaluate = ["evaluate", str(tmp_path / "whole"), "--cuts", str(spelled)]
    assert "label error rate, greedy" in CliRunner().invoke(app, evaluate).output
    pieces.unlink()
    assert len(load(tmp_path / "whole").config.objective.vocabulary) == 15
    for command in (["transcribe", str(tmp_path / "whole"), str(spelled)], [*evaluate, "--wer"]):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output
    result = CliRunner().invoke(app, evaluate)
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == f"objective.sentencepiece={pieces}: cannot be read: No such file or directory"


def test_the_source_decides_how_waveforms_are_normalised(spelled: Path, tmp_path: Path) -> None:
    source = load_config(
        "fairseq_large_lv60",
        [
            *MICRO_RUN,
            *SPELLED,
            f"data.train={spelled}",
            "trainer.updates=1",
            "schedule.warmup_updates=0",
            "batch.micro_batches=1",
        ],
    )
    assert train(source, tmp_path) == 0
    found = fine_tuning_config(load_config("ctc_1h", [f"trainer.init_from={tmp_path}"])).model
    assert (found.normalize_waveform, found.waveform_eps, found.norm_first) == (True, 1e-5, True)
    own = load_config("ctc_1h", [f"trainer.init_from={tmp_path}", "model.waveform_eps=1e-3"])
    assert fine_tuning_config(own).model.waveform_eps == 1e-3


def test_frozen_parameters_stay_bit_for_bit(spelled: Path, pretrained: Path, tmp_path: Path) -> None:
    before = whole(open_checkpoint(pretrained).model_tensors())
    source = (f"trainer.init_from={pretrained}", "checkpoint.every=4", "checkpoint.keep_last=2", "trainer.updates=8")
    config = settings(spelled, *source, "objective.freeze_encoder_updates=4", "regularization.feature_grad_mult=0")
    train(fine_tuning_config(config), tmp_path)
    frozen, after = (
        whole(open_checkpoint(tmp_path / "checkpoints" / f"update_0000000{n}").model_tensors()) for n in (4, 8)
    )
    shared = [name for name in after if name in before]
    assert set(after) - set(shared) == {"head.weight", "head.bias"}
    assert all(torch.equal(before[name], frozen[name]) for name in shared)
    changed = {name for name in shared if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("encoder.feature_encoder.") for name in changed)
    assert sum(name.startswith("encoder.transformer.blocks.") for name in changed) > 10


def test_unusable_transcripts_are_reported(tmp_path: Path) -> None:
    texts = some_texts(8)
    manifest = write_spelled(tmp_path, [*texts, "", "AB?D ABCD", "ABCDABCD" * 20])
    cuts = [json.loads(line) for line in manifest.read_text().splitlines()]
    cuts[10]["supervisions"][0]["text"] = "AA" * 2000
    manifest.write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    build_index(manifest)
    unused = ("data.max_bad_fraction=0.5", "trainer.updates=6", "data.max_seconds=40", "batch.max_seconds=80")
    train(settings(manifest, *unused), tmp_path / "exp")
    lines = (tmp_path / "exp" / "logs" / "bad_audio.jsonl").read_text().splitlines()
    named = {bad["utterance"]: (bad["kind"], bad["reason"]) for bad in map(json.loads, lines)}
    assert named.keys() == {"u08", "u09", "u10"}
    assert named["u08"] == ("no transcript", "has no transcript")
    assert named["u09"][1] == "its transcript has '?', which is not in objective.vocabulary"
    assert named["u10"][0] == "too short" and "frames are too few for the 4000 labels" in named["u10"][1]


class TestTargetsBeforeTheFirstUpdate:
    UNKNOWN = "objective.vocabulary=['<pad>', '[UNK]', '|', A, B, C, D]"

    def printed(self, capsys: pytest.CaptureFixture[str]) -> str:
        return " ".join(capsys.readouterr().out.split())

    def test_labels_unknown_symbols_and_utterances_without_transcript_are_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        manifest = write_spelled(tmp_path, [*some_texts(8), "", "AB?D AB?C!"])
        labels = sum(map(len, some_texts(8))) + 10
        found = (
            f"data.train: {labels} labels in 9 transcripts, {3 / labels:.2%} of them [UNK]: '?' 2, '!' 1; utterances"
        )
        config = settings(manifest, self.UNKNOWN, "trainer.updates=4", "data.max_bad_fraction=0.5")
        train(config, tmp_path / "exp")
        assert f"{found} left out: 1 without a transcript" in self.printed(capsys)
        train(config, tmp_path / "exp")
        assert "labels in" not in self.printed(capsys)  # a finished or resumed run is past its first update
        lines: list[str] = []
        dry_run(config, lines.append)
        assert sum(line.startswith(found) for line in lines) == 1

    def test_too_many_unknown_symbols_are_refused(self, tmp_path: Path) -> None:
        manifest = write_spelled(tmp_path, ["ABCD ABEF", "ABCD ABCD"])
        message = (
            r"data\.train: more is unknown than objective\.max_unknown_fraction=0\.05: 18 labels in 2 "
            r"transcripts, 11\.11% of them \[UNK\]: 'E' 1, 'F' 1; make "
            r"another objective\.vocabulary \(w2vscale data vocabulary CUTS -o FILE\)"
        )
        config = settings(manifest, self.UNKNOWN, "trainer.updates=4")
        for run in (lambda: train(config, tmp_path / "exp"), lambda: dry_run(config)):
            with pytest.raises(UserError, match=message):
                run()
        train(settings(manifest, self.UNKNOWN, "trainer.updates=4", "objective.max_unknown_fraction=0.2"), tmp_path)

    def test_a_corpus_without_transcripts_is_refused(self, tmp_path: Path) -> None:
        manifest = write_spelled(tmp_path, ["", " "])
        with pytest.raises(UserError, match=r"data\.train: no utterance has a transcript that can be used: 0 labels"):
            train(settings(manifest), tmp_path / "exp")

    def test_a_large_corpus_is_sampled(
        self, spelled: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(run_module, "TARGETS_READ", 4)
        train(settings(spelled, "trainer.updates=4"), tmp_path)
        assert "data.train, 4 of 10 utterances: " in self.printed(capsys)

    def test_other_objectives_say_nothing(self, spelled: Path) -> None:
        lines: list[str] = []
        dry_run(load_config("base", [*MICRO_RUN, *SPELLED, f"data.train={spelled}"]), lines.append)
        assert not any("data.train" in line for line in lines)


def windows(folder: Path, seconds: float) -> Path:
    """A manifest of windows that Lhotse cuts out of utterances of two words, which keep the whole text."""
    manifest = write_spelled(folder, ["ABCD ABCD", "ABC"])
    cuts = [window for cut in CutSet.from_file(manifest) for window in cut.cut_into_windows(seconds)]
    return write_manifest(folder / "windows.jsonl", cuts)


def test_windows_with_the_text_of_the_whole_are_left_out(memorised: Path, tmp_path: Path) -> None:
    manifest = windows(tmp_path, 0.5)
    train(settings(manifest, "data.max_bad_fraction=1", "trainer.updates=4", "data.min_seconds=0.2"), tmp_path / "exp")
    records = read_log(tmp_path / "exp" / "logs" / "bad_audio.jsonl")[0]
    assert [record["kind"] for record in records] == ["overhanging text"] * 2
    assert all(record["left_out"] for record in records)
    assert {record["reason"] for record in records} == {
        "has text from 0.00 to 0.90 s, but lasts from 0 to 0.50 s",
        "has text from -0.50 to 0.40 s, but lasts from 0 to 0.40 s",
    }
    score = score_checkpoint(load(memorised), [manifest])
    assert [one.reference for one in score.utterances] == ["ABC"]
    assert sorted(bad.kind for bad in score.bad) == ["overhanging text"] * 2


@pytest.mark.parametrize("symbols", ["<pad> <unk> A B C D", "A <unk> | B C D", "<pad> <unk> | A B C D e\u0301"])
def test_checkpoints_of_earlier_versions_open(spelled: Path, tmp_path: Path, symbols: str) -> None:
    """Their vocabularies were not checked, and their settings do not say how texts are split."""
    vocabulary = f"objective.vocabulary={json.dumps(symbols.split(), ensure_ascii=False)}"
    config = load_config("base", [*SPELLING, vocabulary])
    assert config.objective.model_dump().keys() == {"name", "vocabulary", "mask_probability"}
    save_model(tmp_path, config, random_model(config, seed=3).state_dict(), TrainState(update=1))
    assert evaluate_checkpoint(tmp_path, [spelled]) is not None
    assert score_checkpoint(load(tmp_path), [spelled]).words.reference > 0
    export_checkpoint(tmp_path, tmp_path / "out", form="torchaudio")


def test_a_run_continues_with_another_unicode_form_of_its_vocabulary(spelled: Path, tmp_path: Path) -> None:
    decomposed = [*"|ABCDé", "ñ"]
    for form in ("NFC", "NFD"):
        file = tmp_path / f"{form}.txt"
        file.write_text(unicodedata.normalize(form, "\n".join(["<pad>", *decomposed])) + "\n")
    for form, updates in (("NFC", 4), ("NFD", 6)):
        config = settings(spelled, f"objective.vocabulary={tmp_path / form}.txt", f"trainer.updates={updates}")
        assert train(config, tmp_path / "exp") == 0
    assert len(read_metrics(tmp_path / "exp" / "metrics.jsonl", "train")) == 6


def test_phones_are_trained_scored_and_transcribed(tmp_path: Path) -> None:
    manifest = write_spelled(tmp_path, ["ABCD ABCD", "ABC DABC", "BCDA"])
    cuts = CutSet.from_file(manifest).to_eager()
    for cut in cuts:
        cut.supervisions[0].text = " ".join(f"p{letter}" for letter in cut.supervisions[0].text.replace(" ", ""))
    phones = write_manifest(tmp_path / "phones.jsonl", cuts)
    overrides = ["objective.vocabulary=['<pad>', '<unk>', pa, pb, pc, pd]", "trainer.updates=4"]
    train(settings(phones, f"data.validation={phones}", *overrides), tmp_path / "exp")
    model = load(tmp_path / "exp")
    assert model.objective.spaced and model.config.objective.model_dump()["split"] == "spaces"
    score = score_checkpoint(model, [phones])
    assert score.words.reference == 19 and score.utterances[-1].reference == "pb pc pd pa"
    assert read_metrics(tmp_path / "exp" / "metrics.jsonl", "validation")[-1]["wer"] > 0.0
    texts = [one.text for one in transcribe(model, find_utterances([phones])) if isinstance(one, Transcript)]
    assert {*" ".join(texts).split()} <= {"<unk>", "pa", "pb", "pc", "pd"}


def test_long_utterances_are_left_out_and_not_cropped(
    spelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(spelled, "data.max_seconds=0.95", "trainer.updates=4"), tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "of 10 utterances: shorter than data.min_seconds or longer than data.max_seconds" in printed


def test_a_dry_run(spelled: Path) -> None:
    found = dry_run(settings(spelled))
    assert found is not None
    assert found.shapes["labels_L"][0] == found.weight > 0
    assert found.grad_norm > 0


class TestCommandLine:
    def test_it_has_the_architecture_of_its_source_and_resumes_without_it(
        self, spelled: Path, pretrained: Path, tmp_path: Path
    ) -> None:
        source, exp = tmp_path / "source", tmp_path / "exp"
        shutil.copytree(pretrained, source, symlinks=True)
        command = [
            "finetune", "ctc_1h", f"trainer.init_from={source}", f"data.train={spelled}", "trainer.updates=2",
            "objective.freeze_encoder_updates=1", "batch.micro_batches=1", "data.workers=0", "precision.compute=fp32",
            "--exp", str(exp),
        ]  # fmt: skip
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "label errors" not in result.output and "per label" in result.output
        assert load_config(exp / "config.yaml").model.dim == 32
        shown = CliRunner().invoke(app, ["evaluate", str(exp), "--cuts", str(spelled)])
        assert "label error rate, greedy" in shown.output
        shutil.rmtree(source)
        # Known from its folder alone, although its settings have the architecture of the source.
        assert "w2vscale checkpoint verify" in CliRunner().invoke(app, command).output
        (exp / "config.yaml").unlink()
        for place in (exp / "checkpoints", exp / "checkpoints" / "latest"):
            assert "nothing to do" in CliRunner().invoke(app, [*command, "--resume", str(place)]).output
        new = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "other")])
        assert isinstance(new.exception, UserError) and "no such" in str(new.exception)

    def test_the_baseline_has_the_architecture_and_nothing_else(
        self, spelled: Path, pretrained: Path, tmp_path: Path
    ) -> None:
        source = (
            f"trainer.init_from={pretrained}",
            "objective.freeze_encoder_updates=1",
            "regularization.feature_grad_mult=0",
        )
        command = [
            "finetune",
            "base",
            *SPELLING,
            f"data.train={spelled}",
            *source,
            "trainer.updates=4",
            "trainer.seed=7",
            "--scratch",
        ]
        result = CliRunner().invoke(app, [*command, "--exp", str(tmp_path)])
        assert result.exit_code == 0, result.output
        config = load_config(tmp_path / "config.yaml")
        assert config.model.dim == 32 and config.trainer.init_from is None
        assert (config.objective.freeze_encoder_updates, config.regularization.feature_grad_mult) == (0, 1.0)
        one, other = (whole(open_checkpoint(path).model_tensors()) for path in (pretrained, tmp_path))
        name = "encoder.transformer.blocks.0.attention.qkv.weight"
        assert one[name].shape == other[name].shape and not torch.allclose(one[name], other[name], atol=1e-2)

    def test_a_missing_setting_is_an_error(self, spelled: Path, pretrained: Path) -> None:
        for arguments, message in (
            (["tiny"], "objective.name=wav2vec2 has no vocabulary; use a fine-tuning preset such as ctc_1h"),
            (["ctc_1h"], "the encoder is frozen but randomly initialised; set trainer.init_from"),
            (["ctc_1h", "--scratch"], "--scratch needs trainer.init_from: the checkpoint whose architecture is used"),
        ):
            result = CliRunner().invoke(app, ["finetune", *arguments, f"data.train={spelled}"])
            assert isinstance(result.exception, UserError) and message in str(result.exception)

    def test_another_vocabulary_does_not_resume(self, spelled: Path, tmp_path: Path) -> None:
        train(settings(spelled, "trainer.updates=4"), tmp_path)
        with pytest.raises(UserError, match=r"objective\.vocabulary=.* was made with"):
            train(settings(spelled, "objective.vocabulary=['<pad>', '|', A, B]"), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.freeze_encoder_updates=5"], "the encoder is frozen but randomly initialised"),
        (["regularization.feature_grad_mult=0"], "the encoder is frozen but randomly initialised"),
        (
            ["objective.freeze_encoder_updates=5", "trainer.init_from=exp/base", "optim.weight_decay=0.01"],
            "a weight decay of 0.01 would shrink the encoder while it is frozen .*; set optim.weight_decay=0",
        ),
        (
            [
                "objective.freeze_encoder_updates=5",
                "trainer.init_from=exp/base",
                "optim.groups=[{pattern: mask, weight_decay: 0.2}]",
            ],
            "a weight decay of 0.2 would shrink the encoder",
        ),
        (["augment.speed=[0.9]"], r"augment.speed=\[0.9\]: slowed utterances are cropped, which objective.name=ctc"),
        (["objective.vocabulary=[]", "objective.sentencepiece=no.model"], "no.model: cannot be read: No such file"),
        (["objective.vocabulary=[]"], "objective.vocabulary is empty; use a fine-tuning preset such as ctc_1h"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    spelled: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    """By the library, so that `w2vscale train` refuses them too."""
    for run in (
        lambda: train(settings(spelled, *overrides), tmp_path / "exp"),
        lambda: dry_run(settings(spelled, *overrides)),
    ):
        with pytest.raises(UserError, match=message):
            run()
    assert not (tmp_path / "exp").exists()


class TestRunScript:
    def finetune(self, *arguments: object) -> None:
        result = CliRunner().invoke(app, list(map(str, arguments)), obj=list(map(str, arguments)))
        assert result.exit_code == 0, result.output

    @pytest.mark.long
    @pytest.mark.parametrize("options", [[], ["--scratch"]])
    def test_it_repeats_the_command(
        self, spelled: Path, pretrained: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        command = [
            "finetune", "ctc_1h", f"trainer.init_from={pretrained}", f"data.train={spelled}", "trainer.updates=2",
            "batch.micro_batches=1", "data.workers=0", "precision.compute=fp32", "--exp", "exp", *options,
        ]  # fmt: skip
        self.finetune(*command)
        script = (tmp_path / "exp" / "run.sh").read_text()
        assert f"cd {tmp_path}\n" in script and f" -m w2vscale {shlex.join(command)} " in script
        before = whole(open_checkpoint(tmp_path / "exp").model_tensors())
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            [tmp_path / "exp" / "run.sh"], capture_output=True, text=True, timeout=120, cwd="/",
            env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        assert done.returncode == 0 and "nothing to do" in done.stdout, done.stderr
        shutil.rmtree(tmp_path / "exp" / "checkpoints")
        subprocess.run(
            [tmp_path / "exp" / "run.sh"], capture_output=True, timeout=120, cwd="/", check=True,
            env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        again = whole(open_checkpoint(tmp_path / "exp").model_tensors())
        assert all(torch.equal(before[name], again[name]) for name in before)
