"""The recipe that continues an imported model on your own language, or pretrains on several: data and stages."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lhotse import SupervisionSegment
from lhotse.utils import fastcopy
from typer.testing import CliRunner

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.recipes.test_recipes import RECIPES, SMALL_BATCH, TUNING, environment, run
from w2vscale.config import dump_config, load_config
from w2vscale.data.manifest import language_of
from w2vscale.errors import UserError
from w2vscale.objectives import load

__all__ = ["environment"]

LOCAL = RECIPES / "xlsr" / "local"
SHORT = (
    "trainer.updates=3",
    "schedule.warmup_updates=1",
    "data.workers=0",
    "data.min_seconds=1",
    "logging.tensorboard=false",
    "precision.compute=fp32",
)


def cuts_command(*arguments: object) -> None:
    """`local/cuts.py` in this process. Raises its UserError."""
    app = runpy.run_path(str(LOCAL / "cuts.py"))["app"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recordings(path: Path) -> set[str]:
    return {cut["recording"]["id"] for cut in read(path)}


def corpus(folder: Path, names: Sequence[str], *, texts: bool | Sequence[str] = True, manifest: str = "train") -> Path:
    """A folder with a manifest of short recordings, of which all, none or those in `texts` have a transcript."""
    audio = write_audio(folder / "one.wav", noise(1.0))
    cuts = []
    for name in names:
        cut = cut_of(audio, identifier=name)
        text = "eins zwei" if texts is True or (texts and name in texts) else None
        if text is not None:
            cut = fastcopy(cut, supervisions=[SupervisionSegment(cut.id, name, 0.0, cut.duration, text=text)])
        cuts.append(cut)
    write_manifest(folder / f"cuts_{manifest}.jsonl", cuts, index=False)
    return folder


NAMES = [f"r{number}" for number in range(100)]


def place(name: str) -> float:
    """Where a recording is between 0 and 1, by the CRC-32 of its id."""
    return zlib.crc32(name.encode()) / 2**32


class TestSplit:
    def test_recordings_are_held_out_by_a_hash_of_their_ids(self, tmp_path: Path) -> None:
        corpus(tmp_path / "in", NAMES)
        shares = ("--dev-share", "0.2", "--test-share", "0.3")
        cuts_command("split", tmp_path / "in", tmp_path / "out", "--name", "de", *shares)
        found = {part: recordings(tmp_path / "out" / f"cuts_de_{part}.jsonl") for part in ("train", "dev", "test")}
        assert found["dev"] == {name for name in NAMES if place(name) < 0.2}
        assert found["test"] == {name for name in NAMES if 0.2 <= place(name) < 0.5}
        assert found["train"] == set(NAMES) - found["dev"] - found["test"]

    def test_only_what_has_a_transcript_is_held_out(self, tmp_path: Path) -> None:
        corpus(tmp_path / "in", NAMES, texts=NAMES[::2])
        cuts_command("split", tmp_path / "in", tmp_path / "out", "--name", "de", "--dev-share", "0.2")
        assert recordings(tmp_path / "out" / "cuts_de_dev.jsonl") == {name for name in NAMES[::2] if place(name) < 0.2}
        assert set(NAMES[1::2]) <= recordings(tmp_path / "out" / "cuts_de_train.jsonl")

    def test_without_transcripts_there_is_nothing_to_test(self, tmp_path: Path) -> None:
        corpus(tmp_path / "in", NAMES[:3], texts=False)
        cuts_command("split", tmp_path / "in", tmp_path / "out", "--name", "de", "--language", "de")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "cuts_de_dev.jsonl",
            "cuts_de_train.jsonl",
        ]
        first = min(NAMES[:3], key=place)  # no hash is below the share
        assert recordings(tmp_path / "out" / "cuts_de_dev.jsonl") == {first}
        for cut in read(tmp_path / "out" / "cuts_de_train.jsonl"):
            assert language_of(cut) == "de"

    def test_manifests_keep_their_part_and_get_the_language(self, tmp_path: Path) -> None:
        for part, names in (("sv-SE_train", "ab"), ("dev-clean", "c"), ("sv_validation", "d"), ("TEST", "e")):
            corpus(tmp_path / "in", names, manifest=part)
        cuts_command("split", tmp_path / "in", tmp_path / "out", "--name", "sv", "--language", "sv")
        for part, names in (("train", "ab"), ("dev", "cd"), ("test", "e")):
            cuts = read(tmp_path / "out" / f"cuts_sv_{part}.jsonl")
            assert {cut["recording"]["id"] for cut in cuts} == set(names)
            assert all(language_of(cut) == "sv" for cut in cuts)

    def test_what_cannot_be_split_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "none").mkdir()
        for folder, message in (
            (tmp_path / "none", r"none: has no cuts_\*.jsonl; write them with: w2vscale data prepare"),
            (
                corpus(tmp_path / "few", "abc", texts="ab"),
                "2 transcribed recordings are too few to hold out some for dev and test",
            ),
            (corpus(tmp_path / "dev", "ab", manifest="dev"), "has manifests for dev, but none for training"),
        ):
            with pytest.raises(UserError, match=message):
                cuts_command("split", folder, tmp_path / "out", "--name", "de")
        with pytest.raises(UserError, match="no utterance for dev"):
            cuts_command("split", corpus(tmp_path / "in", NAMES), tmp_path / "out", "--name", "de", "--dev-share", "0")


def test_transcribed_utterances_of_one_language_are_selected(tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    for name, texts in (("de", ["r1", "r2"]), ("it", False)):
        folder = corpus(tmp_path / name, NAMES[:4], texts=texts)
        cuts_command("split", folder, manifests, "--name", name, "--language", name, "--test-share", "0")
    every = sorted(manifests.iterdir())
    assert [path.name for path in every] == [
        f"cuts_{name}_{part}.jsonl" for name in ("de", "it") for part in ("dev", "train")
    ]
    for language, names in (("", ["cuts_de_dev.jsonl", "cuts_de_train.jsonl"]), ("it", [])):
        output = tmp_path / f"chosen{language}"
        cuts_command("transcribed", output, *every, "--language", language)
        assert sorted(path.name for path in output.iterdir()) == names
    assert recordings(tmp_path / "chosen" / "cuts_de_train.jsonl") == {max("r1", "r2", key=place)}


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Two folders, de and fr."""
    for language in ("de", "fr"):
        corpus(tmp_path / language, NAMES[:4])
    return tmp_path


def commands(folder: Path, *options: str) -> list[str]:
    """What --print-command prints to stdout, without the environment of the processes."""
    done = subprocess.run(
        ["bash", str(RECIPES / "xlsr" / "run.sh"), "--print-command", "--data", "data", *options],
        cwd=folder, capture_output=True, text=True, timeout=240, env=os.environ | {"W2VSCALE_VENV": sys.prefix},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [re.sub(r"^env .*/?w2vscale train", "train", line) for line in done.stdout.splitlines()]


def test_one_and_eight_gpus_run_the_same_settings(speech: Path) -> None:
    for number in ("1", "8"):
        dry, real = commands(speech, "--model", "de", "--audio", "de", "--nproc", number, "optim.lr=2e-4")
        data = speech / "data" / "corpora" / "de"
        assert real == (
            f"train --nproc-per-node {number} {RECIPES}/xlsr/conf/continued.yaml "
            f"'data.train=[{data}/cuts_de_train.jsonl]' data.validation={data}/cuts_de_dev.jsonl "
            f"--exp {RECIPES}/xlsr/exp/de_continued trainer.init_from={speech}/data/imported/de optim.lr=2e-4"
        )
        assert dry == f"{real} --dry-run"
    assert 64 % 8 == load_config(RECIPES / "xlsr" / "conf" / "continued.yaml").batch.micro_batches % 8 == 0


def test_several_languages_are_mixed_from_random_weights(speech: Path) -> None:
    _, real = commands(speech, "--audio", "de=de de=fr", "--manifests", "fr", "--conf", "1b", "--exp", "all")
    data = speech / "data" / "corpora"
    names = ("de", "de-2", "fr")
    listed = ",".join(f"{data}/{name}/cuts_{name}_train.jsonl" for name in names)
    assert f"{RECIPES}/xlsr/conf/1b.yaml 'data.train=[{listed}]'" in real and "init_from" not in real
    for size in ("300m", "1b", "2b"):
        config = load_config(RECIPES / "xlsr" / "conf" / f"{size}.yaml")
        assert (config.mix.by, config.mix.temperature) == ("language", 0.5)
        assert config.batch.micro_batches % 8 == 0


def test_fine_tuning_keeps_the_state_where_pretraining_had_it(tmp_path: Path) -> None:
    different = runpy.run_path(str(LOCAL / "settings.py"))["different"]
    conf = str(RECIPES / "xlsr" / "conf" / "finetune_2b.yaml")
    for engine, expected in (
        (("engine.name=fsdp", "engine.offload=true"), ["engine.name=fsdp", "engine.offload=true"]),
        (
            ("engine.name=deepspeed", "engine.deepspeed_config=zero3_offload", "engine.activation_checkpointing=none"),
            ["engine.name=deepspeed", "engine.deepspeed_config=zero3_offload"],
        ),
    ):
        run = settings_of_run(tmp_path / engine[0], "xlsr_2b", *engine)
        assert list(different("placement", conf, str(run))) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--audio or --manifests is required"),
        (["--audio", "de nowhere"], "--audio nowhere: no such file or folder"),
        (["--manifests", "de=nowhere"], "--manifests nowhere: no such file or folder"),
        (["--audio", "de", "--model", "nowhere"], "--model nowhere: no such file or folder"),
        (["--audio", "de", "--dev-share", "5"], "--dev-share takes a fraction below 1, not '5'"),
        (["--audio", "de", "--test-share", "nan"], "--test-share takes a fraction below 1, not 'nan'"),
        (["--audio", "de", "--vocabulary", "nowhere"], "--vocabulary nowhere: no such file or folder"),
    ],
)
def test_wrong_folders_are_one_line(speech: Path, options: list[str], message: str) -> None:
    done = subprocess.run(
        ["bash", str(RECIPES / "xlsr" / "run.sh"), *options], cwd=speech, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr


def random_model(folder: Path) -> Path:
    """A pretraining model of Transformers, of the kind of XLS-R, with random weights."""
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16,) * 7,
        feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, codevector_dim=16, proj_codevector_dim=24, num_codevectors_per_group=12,
    )  # fmt: skip
    transformers.Wav2Vec2ForPreTraining(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return folder


def settings_of_run(folder: Path, preset: str, *overrides: str) -> Path:
    """A run folder with nothing but the settings of its newest checkpoint."""
    latest = folder / "checkpoints" / "latest"
    latest.mkdir(parents=True)
    (latest / "config.yaml").write_text(dump_config(load(preset, overrides)[0]))
    return folder


def test_the_architecture_is_that_of_the_model_and_all_else_that_of_the_conf(tmp_path: Path) -> None:
    different = runpy.run_path(str(LOCAL / "settings.py"))["different"]
    conf = RECIPES / "xlsr" / "conf" / "continued_1b.yaml"
    base = settings_of_run(tmp_path / "base", "base", "objective.gumbel_start=1.5", "model.waveform_eps=1e-5")
    config, _ = load(str(conf), list(different("architecture", str(conf), str(base))))
    theirs, _ = load("base", ["model.waveform_eps=1e-5"])
    assert config.model == theirs.model
    assert dict(config.objective)["codevector_dim"] == 256 and dict(config.objective)["gumbel_start"] == 0.1
    assert config.regularization == load_config(conf).regularization
    assert list(different("architecture", str(conf), "xlsr_1b")) == []


def test_a_model_is_evaluated_on_the_masks_of_another() -> None:
    different = runpy.run_path(str(LOCAL / "settings.py"))["different"]
    changes = list(different("evaluation", "large_lv60", str(RECIPES / "demo" / "conf" / "pretrain.yaml")))
    config, demo = load("large_lv60", changes)[0], load(RECIPES / "demo" / "conf" / "pretrain.yaml")[0]
    assert config.batch == demo.batch and config.precision == demo.precision
    assert (config.data.max_seconds, config.data.min_seconds) == (6.0, 1.0)
    settings = dict(config.objective)
    assert (settings["mask_length"], settings["mask_probability"], settings["codevector_dim"]) == (3, 0.35, 768)


def test_a_run_is_continued_with_settings_for_its_size(speech: Path) -> None:
    model = settings_of_run(speech / "big", "xlsr_1b")
    (dry,) = commands(speech, "--model", "big", "--audio", "de", "--stop-stage", "3")
    assert f"{RECIPES}/xlsr/conf/continued_1b.yaml" in dry
    assert f"--exp {RECIPES}/xlsr/exp/big_continued trainer.init_from={model} --dry-run" in dry


@pytest.mark.long
def test_an_imported_model_is_continued_and_compared_with_itself(environment: str, tmp_path: Path) -> None:
    model = random_model(tmp_path / "xls-r-0m")
    for number in range(16):
        write_audio(tmp_path / "ainu" / f"{number}.wav", noise(2.1 + 0.1 * number, seed=number))
        if number < 12:
            (tmp_path / "ainu" / f"{number}.txt").write_text("Irankarapte" if number % 2 else "e=aye yan")
    options = (
        "--model", str(model), "--audio", f"ain={tmp_path / 'ainu'}", "--data", str(tmp_path / "data"),
        "--exp", str(tmp_path / "exp"), "--dev-share", "0.2", "--test-share", "0.2",
        "--finetune-settings", f"{TUNING} trainer.validate_every=1 checkpoint.every=1",
    )  # fmt: skip

    def again(*changes: str, code: int = 0) -> str:
        return run("xlsr", *options, *changes, *SHORT, *SMALL_BATCH, environment=environment, code=code)

    printed = again()
    for number in range(11):
        assert f"stage {number}: done in" in printed
    imported = tmp_path / "data" / "imported" / "xls-r-0m"
    assert f"starting from {imported}/checkpoints/update_00000000" in printed
    config, theirs = load_config(tmp_path / "exp"), load_config(imported)
    assert config.model == theirs.model and config.model.dim == 32 and config.model.normalize_waveform
    assert config.trainer.init_from == imported and config.mix.by == "language"

    tuned = [tmp_path / "exp_transcribed", tmp_path / "exp_transcribed_imported"]
    sources = [load_config(run).trainer.init_from for run in tuned]
    assert sources == [tmp_path / "exp", imported]
    symbols = dict(load_config(tuned[0]).objective)["vocabulary"]
    assert set("irankarapteyn=") < set(symbols) and "|" in symbols and "I" not in symbols
    before, after = (json.loads((tmp_path / "exp" / name / "evaluation.json").read_text()) for name in ("xls-r-0m", ""))
    assert (before["update"], after["update"]) == (0, 3)
    assert before["utterances"] == after["utterances"] and before["masked_frames"] == after["masked_frames"]
    page = (tuned[0] / "RESULTS.md").read_text()
    assert page.startswith("# ain\n") and "| exp | 3 |" in page and "| xls-r-0m | 0 |" in page
    for part in ("dev", "test"):
        assert f"`exp_transcribed` against `exp_transcribed_imported` on ain_{part}, greedy" in page
    for folder, kind in ((tmp_path / "exp", "Wav2Vec2ForPreTraining"), (tuned[0], "Wav2Vec2ForCTC")):
        exported = json.loads((folder / "huggingface" / "config.json").read_text())
        assert (exported["architectures"], exported["hidden_size"]) == ([kind], 32)

    same = again()
    assert same.count("done already") == 11 and "done in" not in same
    assert "run.sh: stage 1 was done with test_share=0.2, now test_share=0.3: choose another --data, or rm" in again(
        "--test-share", "0.3", code=2
    )
    assert "run.sh: stage 4 was done without optim.lr, now optim.lr=0.1: choose another --exp" in again(
        "--stage", "4", "--", "optim.lr=0.1", code=2
    )
    random_model(tmp_path / "other")
    assert "run.sh: stage 4 was done with imported=xls-r-0m at update_00000000 (checksum" in again(
        "--model", str(tmp_path / "other"), code=2
    )


@pytest.mark.long
@pytest.mark.distributed
def test_two_languages_are_pretrained_by_two_processes_and_exported(environment: str, tmp_path: Path) -> None:
    for language, count in (("de", 12), ("fr", 6)):
        for number in range(count):
            write_audio(tmp_path / language / f"{number}.wav", noise(2.1 + 0.1 * number, seed=number))
    options = (
        "--audio", f"de={tmp_path / 'de'} fr={tmp_path / 'fr'}", "--data", str(tmp_path / "data"),
        "--exp", str(tmp_path / "exp"), "--nproc", "2",
    )  # fmt: skip
    model = ("model.layers=2", "model.dim=32", "model.ffn_dim=64", "model.heads=4", "model.positional_groups=4")
    narrow = ("model.conv_layers=[[16,10,5],[16,3,2],[16,3,2],[16,3,2],[16,3,2],[16,2,2],[16,2,2]]",)
    batch = ("batch.micro_batches=2", "batch.max_seconds=8", "data.max_seconds=3")
    printed = run("xlsr", *options, *SHORT, *model, *narrow, *batch, environment=environment)
    assert [number for number in range(11) if f"stage {number}: done in" in printed] == [1, 2, 3, 4, 5, 6, 10]
    assert printed.count("stage 1: done in") == 2 and "ddp on 2 ranks" in printed
    assert "there are no transcripts: nothing is fine-tuned" in printed
    # With hours^0.5, the smaller language has more of an epoch than of the corpus.
    shares = {line.split()[0]: line.split()[2:4] for line in printed.splitlines() if re.match(r" (de|fr) ", line)}
    (of_corpus, of_epoch) = (float(share.rstrip("%")) for share in shares["fr"])
    assert of_corpus + 5 < of_epoch < 50
    config = load_config(tmp_path / "exp")
    assert (config.mix.by, config.mix.temperature, config.trainer.init_from) == ("language", 0.5, None)
    assert len(config.data.train) == len(config.data.validation) == 2
    assert (tmp_path / "exp" / "huggingface" / "model.safetensors").is_file()
    # The same run on one process has nothing left to do.
    same = run("xlsr", *options, "--nproc", "1", *SHORT, *model, *narrow, *batch, environment=environment)
    assert same.count("done already") == 8 and "done in" not in same
