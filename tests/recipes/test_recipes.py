"""The recipes: options, settings, and short runs of all stages."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.helpers.audio import noise, write_audio
from tests.helpers.micro import MICRO_MODEL
from tests.helpers.processes import served_environment
from w2vscale.config import load_config

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/run.sh"))
SHORT = (
    *MICRO_MODEL,
    "trainer.updates=3",
    "schedule.warmup_updates=1",
    "data.workers=0",
    "logging.tensorboard=false",
    "precision.compute=fp32",
)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The environment of the tests in place of .venv/, which path.sh sets up; commands need not wait for imports."""
    if not (Path(sys.prefix) / ".w2vscale-setup").is_file():
        pytest.skip("recipes run in the environment that tools/setup.sh makes, and this is another")
    folder = tmp_path_factory.mktemp("environment")
    server = served_environment(folder)
    yield str(folder)
    server.kill()


def run(recipe: str, *arguments: str, script: str = "run.sh", code: int = 0, environment: str = "none") -> str:
    done = subprocess.run(
        ["bash", str(RECIPES / recipe / script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        # The environment is linked to that of the tests, which nothing may install into.
        env=os.environ | {"W2VSCALE_VENV": environment, "PIP_DRY_RUN": "1"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("*/conf/*.yaml")), ids=lambda path: f"{path.parts[-3]}-{path.stem}"
)
def test_settings_are_valid(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("recipe", NAMES)
def test_a_wrong_option_fails_and_help_lists_the_right_ones(recipe: str) -> None:
    printed = run(recipe, "--bogus", "1", code=2)
    assert "--bogus" in printed
    shown = run(recipe, "--help")
    assert "--stop-stage" in shown
    assert "--nproc" in shown


@pytest.mark.parametrize(
    ("recipe", "option"),
    [(recipe, "lm") for recipe in NAMES if recipe != "evidence"]
    + [
        ("evidence", "audio"),
        ("librispeech", "corpus"),
        ("librispeech", "librilight"),
        ("folder", "audio"),
        ("folder", "transcribed"),
    ],
)
def test_a_missing_path_ends_a_recipe(recipe: str, option: str, tmp_path: Path) -> None:
    there = ("--audio", str(tmp_path)) if recipe in ("folder", "xlsr") and option != "audio" else ()
    assert f"run.sh: --{option} nowhere: no such file or folder" in run(
        recipe, *there, f"--{option}", "nowhere", "--stop-stage", "-1", code=2
    )


SMALL_BATCH = ("batch.micro_batches=1", "batch.max_seconds=8", "data.max_seconds=3")
TUNING = (
    "trainer.updates=2 objective.freeze_encoder_updates=0 data.max_seconds=8 batch.max_seconds=8 batch.micro_batches=1 "
    "data.workers=0 precision.compute=fp32 logging.tensorboard=false"
)
LM = """\\data\\
ngram 1=4
ngram 2=1

\\1-grams:
-2\t<unk>
-99\t<s>\t-0.3
-1\t</s>
-1\tONE\t-0.3

\\2-grams:
-0.2\t<s> ONE

\\end\\
"""


@pytest.mark.slow
def test_the_demo_runs_all_stages_and_repeats_none(environment: str, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="synthetic speech needs the extra w2vscale[synth]")
    options = ("--data", str(tmp_path / "data"), "--exp", str(tmp_path / "exp"), "--label-minutes", "0.2")
    small = ("--train-minutes", "0.6", "--validation-minutes", "0.4", "--speakers", "2", "--finetune-settings", TUNING)
    printed = run("demo", *options, *small, *SHORT, environment=environment)
    for number in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10):
        assert f"stage {number}: done in" in printed
    results = tmp_path / "exp_0.2min" / "RESULTS.md"
    assert "| exp | 3 |" in results.read_text() and "`exp_0.2min` against `exp_0.2min_scratch`" in results.read_text()
    assert (tmp_path / "exp_0.2min" / "huggingface" / "tokenizer_config.json").is_file()
    figures = json.loads((tmp_path / "exp" / "evaluation.json").read_text())
    assert figures["update"] == 3
    assert "evaluation.json" in (tmp_path / "exp" / "report.html").read_text()
    assert "Error rates" in (tmp_path / "exp_0.2min" / "report.html").read_text()

    again = run("demo", *options, *small, *SHORT, environment=environment)
    assert again.count("done already") == 10
    assert "done in" not in again
    mark = tmp_path / "data" / ".synthesise.done"
    assert (
        "run.sh: stage 0 was done with train_minutes=0.6, validation_minutes=0.4, speakers=2, now train_minutes=20, "
        f"validation_minutes=4, speakers=8: choose another --data, or rm {mark} to redo it\n"
    ) in run("demo", *options, environment=environment, code=2)

    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    (tmp_path / "toy.arpa").write_text(LM)
    assert "toy.arpa" not in results.read_text()
    later = run("demo", *options, *small, "--lm", str(tmp_path / "toy.arpa"), *SHORT, environment=environment)
    assert "stage 8: decode with toy.arpa" in later and later.count("done in") == 2
    assert "beam 50, toy.arpa" in results.read_text()
    # A new greedy decoding may be of other models, so results with the language model are not kept beside it.
    (tmp_path / "exp_0.2min" / ".decode.done").unlink()
    later = run("demo", *options, *small, *SHORT, environment=environment)
    assert later.count("done in") == 2 and "toy.arpa" not in results.read_text()


def write_librispeech(corpus: Path) -> None:
    """Noise by two speakers for training and one for decoding, in the folders of LibriSpeech."""
    for part, speakers in (("train-clean-5", (1, 2)), ("dev-clean-2", (3,))):
        for speaker in speakers:
            folder = corpus / part / str(speaker) / "7"
            names = [f"{speaker}-7-{number:04d}" for number in range(4)]
            for number, name in enumerate(names):
                write_audio(folder / f"{name}.flac", noise(2.0 + 0.3 * number, seed=10 * speaker + number))
            (folder / f"{speaker}-7.trans.txt").write_text("".join(f"{name} ONE TWO\n" for name in names))


@pytest.mark.long
def test_librispeech_runs_all_stages_with_shards_and_official_lists(environment: str, tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    write_librispeech(tmp_path / "corpus")
    listed = tmp_path / "librilight" / "1h" / "0" / "clean" / "1" / "7"
    listed.mkdir(parents=True)
    for number in (0, 2):
        (listed / f"1-7-{number:04d}.flac").touch()
    (tmp_path / "toy.arpa").write_text(LM)
    options = (
        "--corpus", str(tmp_path / "corpus"), "--data", str(tmp_path / "data"), "--exp", str(tmp_path / "exp"),
        "--librilight", str(tmp_path / "librilight"), "--amount", "10min", "--shar", "true", "--jobs", "1",
        "--conf", "large", "--lm", str(tmp_path / "toy.arpa"),
        "--finetune-settings", f"{TUNING} trainer.validate_every=1 checkpoint.every=1",
    )  # fmt: skip
    wide = ("model.layers=1", "model.dim=1024", "model.positional_kernel=16", "model.positional_groups=16")
    printed = run("librispeech", *options, *SHORT, *SMALL_BATCH, *wide, environment=environment)
    for number in range(1, 11):
        assert f"stage {number}: done in" in printed
    manifests = tmp_path / "data" / "manifests"
    assert [json.loads(line)["id"] for line in (manifests / "cuts_10min.jsonl").read_text().splitlines()] == [
        "1-7-0000", "1-7-0002",
    ]  # fmt: skip
    settings = load_config(tmp_path / "exp" / "config.yaml")
    assert (settings.data.mode, settings.data.validation) == ("stream", [manifests / "cuts_dev-clean-2.jsonl"])
    assert "settings: the preset ctc_large_10min" in printed
    assert load_config(tmp_path / "exp_10min").optim.lr == 1e-4

    assert dict(load_config(tmp_path / "exp_10min").objective)["mask_trim"] == "none"
    for tuned in (tmp_path / "exp_10min", tmp_path / "exp_10min_scratch"):
        lines = map(json.loads, (tuned / "metrics.jsonl").read_text().splitlines())
        rates = {line["wer"]: line["update"] for line in reversed([line for line in lines if "wer" in line])}
        for name in ("dev-clean-2", "dev-clean-2_lm"):
            decoded = json.loads((tuned / f"wer_{name}.json").read_text())["checkpoint"]
            assert Path(decoded).name == f"update_{rates[min(rates)]:08d}"

    replaced = {str(tmp_path / "exp"): str(tmp_path / "base"), "large": "fairseq_base"}
    base = [replaced.get(one, one) for one in options]
    run("librispeech", *base, "--stop-stage", "4", *SHORT, *SMALL_BATCH, environment=environment)
    printed = run("librispeech", *base, "--stage", "7", "--stop-stage", "7", environment=environment)
    assert "settings: the preset ctc_10min" in printed
    config = load_config(tmp_path / "base_10min")
    assert (config.optim.lr, dict(config.objective)["mask_trim"]) == (5e-5, "micro_batch")
    page = (tmp_path / "exp_10min" / "RESULTS.md").read_text()
    assert page.count("beam 50, toy.arpa") == 3 and "`exp_10min` against `exp_10min_scratch`" in page


@pytest.mark.slow
def test_librispeech_does_not_validate_on_test_sets(environment: str, tmp_path: Path) -> None:
    write_librispeech(tmp_path / "corpus")
    (tmp_path / "corpus" / "dev-clean-2").rename(tmp_path / "corpus" / "test-clean")
    options = ("--corpus", str(tmp_path / "corpus"), "--data", str(tmp_path / "data"), "--jobs", "1")
    printed = run("librispeech", *options, "--stop-stage", "2", environment=environment, code=2)
    assert f"run.sh: --corpus {tmp_path / 'corpus'}: has no folder dev-clean or dev-clean-2; unpack it there" in printed
    assert not (tmp_path / "data").exists()
    (tmp_path / "data" / "manifests").mkdir(parents=True)
    for part in ("train-clean-5", "test-clean"):
        (tmp_path / "data" / "manifests" / f"cuts_{part}.jsonl").touch()
    assert "no cuts_dev-clean.jsonl" in run(
        "librispeech", *options, "--stage", "2", "--stop-stage", "2", environment=environment, code=1
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("dev-clean-2", "run.sh: --corpus {corpus}: has no folder dev-clean-2; unpack it there"),
        ("train-clean-5/1/7/1-7-0002.flac", "{part}: 1 transcripts without audio, such as 1-7-0002; unpack"),
        (
            "train-clean-5/2/7/2-7.trans.txt",
            "{part}: 4 .flac files without a transcript, such as 2-7-0000.flac; unpack",
        ),
    ],
)
def test_a_partial_corpus_is_named_before_any_work(path: str, message: str, tmp_path: Path) -> None:
    corpus = tmp_path / "up" / "LibriSpeech"
    write_librispeech(corpus)
    (corpus / path).rename(tmp_path / "elsewhere")
    printed = run("mini_librispeech", "--corpus", str(corpus.parent), "--data", str(tmp_path / "data"), code=2)
    assert message.format(corpus=corpus.parent, part=corpus / "train-clean-5") in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_real_speech_is_prepared_and_indexed(environment: str, shared_data: Path, tmp_path: Path) -> None:
    options = ("--corpus", os.path.relpath(shared_data / "LibriSpeech"), "--data", str(tmp_path / "data"))
    printed = run("mini_librispeech", *options, "--stop-stage", "1", environment=environment)
    assert "stage 1: done in" in printed
    assert "stage 2" not in printed
    printed = run("mini_librispeech", *options, "--stage", "2", "--stop-stage", "2", environment=environment)
    assert "stage 2: done in" in printed
    assert "stage 1" not in printed
    assert (tmp_path / "data" / "manifests" / "cuts_train-clean-5.jsonl.index.npy").is_file()


@pytest.mark.slow
def test_a_folder_of_any_audio_and_another_with_transcripts(environment: str, tmp_path: Path) -> None:
    for number in range(6):
        write_audio(tmp_path / "audio" / f"{number}.wav", noise(2.0, seed=number))
        write_audio(tmp_path / "transcribed" / f"{number}.ogg", noise(2.0, seed=9 + number))
        (tmp_path / "transcribed" / f"{number}.txt").write_text("one two")
    options = (
        "--audio", str(tmp_path / "audio"), "--transcribed", str(tmp_path / "transcribed"),
        "--data", str(tmp_path / "data"),
        "--exp", str(tmp_path / "exp"), "--validation-share", "0.3", "--test-share", "0.3",
        "--finetune-settings", TUNING,
    )  # fmt: skip
    printed = run("folder", *options, *SHORT, *SMALL_BATCH, environment=environment)
    for number in (1, 2, 4, 5, 6, 7, 8, 9, 10):
        assert f"stage {number}: done in" in printed
    assert "per epoch" in printed
    page = (tmp_path / "exp_transcribed" / "RESULTS.md").read_text()
    assert page.startswith("# audio\n") and "`exp_transcribed` against `exp_transcribed_scratch`" in page
    assert (tmp_path / "exp_transcribed" / "huggingface" / "tokenizer_config.json").is_file()

    def again(*changes: str, code: int = 0) -> str:
        return run("folder", *options, *changes, *SHORT, *SMALL_BATCH, environment=environment, code=code)

    same = again()
    assert same.count("done already") == 9
    assert "done in" not in same
    prepared, exported = tmp_path / "data" / "manifests" / ".prepare.done", tmp_path / "exp_transcribed" / "huggingface"
    was, now = (rf"audio={tmp_path / name} \(\d+ files, \d+ bytes\)" for name in ("audio", "transcribed"))
    assert re.search(
        rf"^run.sh: stage 1 was done with {was}, now {now}: choose another --data, or rm {prepared} to redo it$",
        again("--audio", str(tmp_path / "transcribed"), code=2),
        re.MULTILINE,
    )
    assert "run.sh: stage 4 was done without optim.lr, now optim.lr=0.1: choose another --exp" in again(
        "--", "optim.lr=0.1", code=2
    )

    # A stage that was redone with the same result changes nothing for the others.
    (tmp_path / "exp_transcribed" / ".decode.done").unlink()
    (exported / "notes.txt").touch()
    (tmp_path / "exp_transcribed" / ".export_models.done").unlink()
    prepared.unlink()
    assert again().count("done in") == 3
    assert (exported / "notes.txt").is_file() and not exported.with_suffix(".new").exists()
    # Other data under the same name are noticed.
    for number in range(6):
        write_audio(tmp_path / "audio" / f"{number}.wav", noise(3.0, seed=number))
    prepared.unlink()
    printed = again(code=2)
    assert printed.count("done in") == 2 and "stage 2: was done with train_cuts=cuts_train.jsonl (checksum" in printed
    assert "run.sh: stage 4 was done with train_cuts=cuts_train.jsonl (checksum" in printed
    assert printed.endswith(f": choose another --exp, or rm -r {tmp_path / 'exp'} to train again\n")


def local(script: str, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["bash", str(RECIPES / "librispeech" / "local" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )
    assert done.returncode == code, done.stderr
    return done


def test_libri_lights_lists_are_read_from_its_folders(tmp_path: Path) -> None:
    for part, name in (("1h/0/clean", "3-3-0001"), ("1h/5/other", "1-1-0000"), ("9h/clean", "2-2-0002")):
        folder = tmp_path / part / name.split("-")[0] / name.split("-")[1]
        folder.mkdir(parents=True)
        (folder / f"{name}.flac").touch()
        (folder / f"{name.rpartition('-')[0]}.trans.txt").touch()
    for amount, names in (
        ("10min", ["3-3-0001"]),
        ("1h", ["1-1-0000", "3-3-0001"]),
        ("10h", ["1-1-0000", "2-2-0002", "3-3-0001"]),
    ):
        assert local("librilight_ids.sh", str(tmp_path), amount).stdout.split() == names
    assert "no folder" in local("librilight_ids.sh", str(tmp_path / "none"), "1h", code=2).stderr
    assert "choose 10min, 1h or 10h" in local("librilight_ids.sh", str(tmp_path), "100h", code=2).stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_language_model_is_fetched_whole_and_once(tmp_path: Path) -> None:
    (tmp_path / "4-gram.arpa.gz").write_bytes(gzip.compress(b"\\data\\\n"))
    there = tmp_path.as_uri()
    local("fetch_lm.sh", str(tmp_path / "lm"), OPENSLR=there)
    assert gzip.decompress((tmp_path / "lm" / "4-gram.arpa.gz").read_bytes()) == b"\\data\\\n"
    local("fetch_lm.sh", str(tmp_path / "lm"), OPENSLR="file:///nowhere")
    (tmp_path / "4-gram.arpa.gz").write_bytes(b"<html>not found</html>")
    assert local("fetch_lm.sh", str(tmp_path / "other"), OPENSLR=there, code=1)
    assert not (tmp_path / "other" / "4-gram.arpa.gz").exists()


NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # a port where nothing listens


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_language_model_without_network_is_one_line(tmp_path: Path) -> None:
    printed = local("fetch_lm.sh", str(tmp_path / "lm"), code=1, **NO_NETWORK).stderr
    assert printed.splitlines()[-1] == (
        "fetch_lm.sh: cannot download https://www.openslr.org/resources/11/4-gram.arpa.gz (see above): "
        "repeat the command to continue, or give a model with --lm"
    )


def downloaded(folder: Path, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(RECIPES / "utils" / "download_librispeech.py"), str(folder), "mini"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )
    assert done.returncode == code, done.stderr
    return (done.stderr.splitlines() or [""])[-1]  # a download that succeeds need not print


def test_a_download_without_network_is_one_line(tmp_path: Path) -> None:
    assert downloaded(tmp_path, 1, **NO_NETWORK) == (
        "error: cannot download https://www.openslr.org/resources/31/dev-clean-2.tar.gz: "
        "[Errno 111] Connection refused; repeat the command to continue, or give the folder of an unpacked copy "
        "with --corpus"
    )


class Archives(BaseHTTPRequestHandler):
    """Serves parts of mini LibriSpeech; the first answer ends early."""

    requests: list[str | None]
    damaged = missing = False

    def do_GET(self) -> None:
        if self.missing:
            self.send_error(404)
            return
        part = self.path.split("/")[-1].removesuffix(".tar.gz")
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            noise = tarfile.TarInfo(f"LibriSpeech/{part}/noise")
            noise.size = 1 << 16
            archive.addfile(noise, io.BytesIO(random.Random(1).randbytes(noise.size)))
        first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        sent = b"<html></html>" if self.damaged else content.getvalue()[first:]
        self.requests.append(self.headers["Range"])
        self.send_response(206 if first < len(content.getvalue()) else 416)
        self.send_header("Content-Range", f"bytes */{len(content.getvalue())}")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent[:20_000] if len(self.requests) == 1 else sent)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.mark.long
def test_an_interrupted_download_continues_and_other_failures_are_one_line(tmp_path: Path) -> None:
    class Handler(Archives):
        requests: ClassVar[list[str | None]] = []

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"OPENSLR_RESOURCES": f"http://127.0.0.1:{server.server_port}", "no_proxy": "127.0.0.1"}
        archive = tmp_path / "dev-clean-2.tar.gz"
        assert downloaded(tmp_path, 1, **here).startswith(f"error: {archive}: the download is not complete; repeat")
        downloaded(tmp_path, **here)
        assert Handler.requests[:2] == ["bytes=0-", "bytes=20000-"]
        assert (tmp_path / "LibriSpeech" / "train-clean-5" / "noise").stat().st_size == 1 << 16
        count = len(Handler.requests)
        downloaded(tmp_path, **here)
        assert len(Handler.requests) == count, "nothing is downloaded twice"

        Handler.damaged = True
        line = downloaded(tmp_path / "other", 1, **here)
        assert line.startswith(f"error: {tmp_path}/other/dev-clean-2.tar.gz: the archive is damaged and was deleted;")
        assert not list((tmp_path / "other").glob("*.tar.gz"))
        Handler.missing = True
        line = downloaded(tmp_path / "none", 1, **here)
        assert line.startswith(
            f"error: cannot download {here['OPENSLR_RESOURCES']}/31/dev-clean-2.tar.gz: 404 Not Found;"
        )
        (tmp_path / "file").touch()
        assert downloaded(tmp_path / "file" / "in", 1, **here) == f"error: {tmp_path}/file/in: Not a directory"
        server.shutdown()
