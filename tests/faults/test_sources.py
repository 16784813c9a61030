"""Audio lies in files, or in the archive of a shard. A manifest can neither run a program nor open a connection.

Every attack plants a command that would create a file, the marker.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.helpers.audio import FORMATS, cut_of, noise, write_audio, write_manifest
from tests.helpers.batches import config_with, dataset_of
from tests.helpers.commands import command, error_of
from tests.helpers.tiers import long
from w2vscale.config import load_config
from w2vscale.corpora.shar import write_shards
from w2vscale.corpora.shard_index import index_shards
from w2vscale.data.assembly import Assembler
from w2vscale.data.manifest import INDEX_DTYPE, index_path
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.stream import open_stream
from w2vscale.errors import UserError
from w2vscale.inference.utterances import find_utterances
from w2vscale.objectives import build_objective

Json = dict[str, Any]

MARKER = "marker"  # in the folder of the test, which is the current folder


def source(kind: object = "command", text: object = f"touch {MARKER}") -> Json:
    """An audio source that is not a file."""
    return {"type": kind, "channels": [0], "source": text}


def recording(cut: Json, *sources: Json) -> Json:
    """The recording of a cut with other sources."""
    return {**cut["recording"], "sources": list(sources)}


def reverberation(rir: Json) -> Json:
    """A transform that Lhotse applies when it loads a recording."""
    return {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": rir}}


def track(cut: Json) -> Json:
    """A track of a MixedCut."""
    return {"cut": {**cut, "recording": recording(cut, source())}, "type": "MonoCut", "offset": 0.0}


Attack = Callable[[Json], Json]

ATTACKS: dict[str, Attack] = {
    "command": lambda cut: {"recording": recording(cut, source())},
    "url": lambda cut: {"recording": recording(cut, source("url", "http://127.0.0.1:9/a.wav"))},
    "url that is a pipe": lambda cut: {"recording": recording(cut, source("url", f"pipe:touch {MARKER}"))},
    "memory": lambda cut: {"recording": recording(cut, source("memory", "UklGRg=="))},
    "placeholder": lambda cut: {"recording": recording(cut, source("shar", ""))},
    "unknown type": lambda cut: {"recording": recording(cut, source("Command"))},
    "not a type": lambda cut: {"recording": recording(cut, source(["command"]))},
    "second source": lambda cut: {"recording": recording(cut, *cut["recording"]["sources"], source())},
    "impulse response": lambda cut: {
        "recording": {**cut["recording"], "transforms": [reverberation(recording(cut, source()))]}
    },
    "impulse response of a mix": lambda cut: {
        "recording": {
            **cut["recording"],
            "transforms": [reverberation({"id": "m", "type": "MixedCut", "tracks": [track(cut), track(cut)]})],
        }
    },
    "mix": lambda cut: {"type": "MixedCut", "tracks": [track(cut), track(cut)]},
    "custom field": lambda cut: {"custom": {"target_recording": recording(cut, source())}},
    "supervision": lambda cut: {
        "supervisions": [{"id": "s", "custom": {"deep": [[{"recording": recording(cut, source())}]]}}]
    },
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[Path]:
    """The current folder, in which no command has left its marker at the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob(MARKER))


def lines_of(folder: Path, count: int) -> list[Json]:
    """Good cuts of one second."""
    return [
        {**cut_of(write_audio(folder / f"u{n:02d}.wav", noise(1.0, seed=n))).to_dict(), "id": f"u{n:02d}"}
        for n in range(count)
    ]


def written(path: Path, cuts: Iterable[Json]) -> Path:
    path.write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    return path


def with_forged_index(path: Path) -> Path:
    """Add the index that `data index` would write if it refused nothing."""
    content, offset, records = path.read_bytes(), 0, []
    for line in content.splitlines(keepends=True):
        records.append((offset, json.loads(line)["duration"], 0))
        offset += len(line)
    records.append((offset, zlib.crc32(content), 0))
    np.save(index_path(path), np.array(records, INDEX_DTYPE))
    return path


@pytest.fixture(params=ATTACKS)
def attacked(request: pytest.FixtureRequest, here: Path) -> Path:
    """A manifest whose second of three cuts is an attack."""
    first, second, third = lines_of(here, 3)
    return written(here / "cuts.jsonl", [first, {**second, **ATTACKS[request.param](second)}, third])


def assert_refused(message: str, manifest: Path, place: str) -> None:
    assert message.startswith(f"{manifest}: {place}: has audio of type ")
    if ", which data.url_schemes=file does not allow; nothing is downloaded; " in message:
        return
    assert message.endswith(
        "but only files are read, and nothing is run or downloaded; save the audio as files, and make a manifest with: "
        "w2vscale data prepare folder"
    )


class TestManifests:
    def test_every_command_refuses_it_and_writes_nothing(self, attacked: Path) -> None:
        before = sorted(attacked.parent.iterdir())
        for arguments in (
            ["index", attacked],
            ["index", attacked, "--jobs", 2],
            ["validate", attacked],
            ["validate", attacked, "--audio"],
            ["pieces", attacked, "--output", "p.model"],
        ):
            assert_refused(error_of("data", *arguments), attacked, "line 2")
        with pytest.raises(UserError) as caught:
            find_utterances([attacked])  # of transcribe, features, evaluate --wer and probe
        assert_refused(str(caught.value), attacked, "line 2")
        assert sorted(attacked.parent.iterdir()) == before

    def test_every_command_refuses_it_with_a_forged_index_too(self, attacked: Path) -> None:
        with_forged_index(attacked)
        before = sorted(attacked.parent.iterdir())
        for arguments in (
            ["validate", attacked],
            ["validate", attacked, "--audio"],
            ["stats", attacked, "--config", "tiny", "--set", "data.min_seconds=0.5"],
            ["subset", attacked, "out.jsonl", "--hours", 0.0008],
            ["pieces", attacked, "--output", "p.model"],
        ):
            assert_refused(error_of("data", *arguments), attacked, "utterance 2")
        settings = ("data.max_seconds=1", "data.min_seconds=0.5", "batch.max_seconds=2")
        dataset = dataset_of(attacked, config_with(*settings))
        with pytest.raises(UserError) as caught:
            list(dataset.one_epoch())
        assert_refused(str(caught.value), attacked, "utterance 2")
        assert sorted(attacked.parent.iterdir()) == before

    def test_shards_are_not_made_of_it(self, attacked: Path) -> None:
        assert_refused(error_of("data", "shar", with_forged_index(attacked), "shards"), attacked, "utterance 2")
        assert not list((attacked.parent / "shards").glob("cuts.*"))

    def test_escapes_in_json_hide_nothing(self, here: Path) -> None:
        (cut,) = lines_of(here, 1)
        text = json.dumps({**cut, **ATTACKS["command"](cut)})
        path = here / "cuts.jsonl"
        path.write_text(text.replace("command", "comm\\u0061nd").replace('"sources"', '"sourc\\u0065s"') + "\n")
        assert_refused(error_of("data", "index", path), path, "line 1")

    @pytest.mark.parametrize("setting", ["noise", "reverb"])
    def test_augmentation_refuses_it(self, setting: str, here: Path) -> None:
        (cut,) = lines_of(here, 1)
        path = with_forged_index(written(here / "cuts.jsonl", [{**cut, **ATTACKS["command"](cut)}]))
        good = write_manifest(here / "good.jsonl", [cut_of(here / "u00.wav")])
        augment = (f"data.train={good}", f"augment.{setting}={path}", f"augment.{setting}_probability=1")
        assert_refused(
            error_of("train", "tiny", *augment, "data.min_seconds=0.5", "data.workers=0", "--dry-run"),
            path,
            "utterance 1",
        )


@pytest.mark.slow
def test_training_refuses_it_wherever_it_is_in_the_manifest(here: Path) -> None:
    """In the sample that is read at the start, and in a later utterance, which a loader process reads."""
    settings = ["data.max_seconds=1", "data.min_seconds=0.5", "data.workers=1", "batch.max_seconds=8"]
    settings += ["batch.micro_batches=1", "engine.compile=false", "precision.compute=fp32"]
    for place in (0, 37):
        cuts = lines_of(here, 38)
        cuts[place] |= ATTACKS["command"](cuts[place])
        path = with_forged_index(written(here / f"cuts{place}.jsonl", cuts))
        done = command("train", "tiny", f"data.train={path}", *settings, "--exp", here / f"exp{place}")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            f"error: {path}: utterance {place + 1}: has audio of type 'command', but only files are read"
        )


class TestNamesOfFiles:
    """A name is a name, whatever characters it has."""

    NAMES = (
        f"a$(touch {MARKER}).sph",
        f"b`touch {MARKER}`.wav",
        f"c; touch {MARKER} #.flac",
        f"d' \"| touch {MARKER}&.ogg",
        f"e\ntouch {MARKER}\n.mp3",
        f"pipe:touch {MARKER}.wav",
        f"pipe:touch {MARKER}.tar/in a folder.opus",
        "-",
        "http:/127.0.0.1:9.wav",
        "~.wav",
    )

    @pytest.mark.parametrize("absolute", [True, long(False)])
    def test_they_are_read_and_nothing_else_happens(self, absolute: bool, here: Path) -> None:
        lines = []
        for number, name in enumerate(self.NAMES):
            audio = noise(1.0, seed=number)
            path = here / name
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                kind, subtype = {**FORMATS, ".sph": ("NIST", "PCM_16"), "": ("WAV", "PCM_16")}[path.suffix]
                soundfile.write(file, audio, 16_000, format=kind, subtype=subtype)
            (line,) = lines_of(here / "other", 1)
            where = {**line["recording"]["sources"][0], "source": str(path) if absolute else name}
            lines.append({**line, "id": f"u{number}", "recording": recording(line, where)})
        path = written(here / "cuts.jsonl", lines)
        programs, done = audited(here, "data", "validate", path, "--audio")
        assert (done.returncode, done.stderr) == (0, "")
        assert programs == []
        assert command("data", "shar", path, here / "shards").returncode == 0

    def test_a_folder_of_them_is_prepared_and_decoded(self, here: Path) -> None:
        for number, name in enumerate(self.NAMES[1:5]):
            path = here / "audio" / name
            write_audio(here / f"plain{path.suffix}", noise(1.0, seed=number))
            path.parent.mkdir(exist_ok=True)
            shutil.copy(here / f"plain{path.suffix}", path)
        programs, done = audited(here, "data", "prepare", "folder", here / "audio", here / "out")
        assert (done.returncode, programs) == (0, [])
        assert command("data", "validate", here / "out" / "cuts_train.jsonl", "--audio").returncode == 0

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
    def test_what_is_not_a_file_is_missing(self, make: Callable[[str], None], here: Path) -> None:
        (line,) = lines_of(here, 1)
        (here / "u00.wav").unlink()
        make("u00.wav")
        assert "no such file" in error_of("data", "validate", written(here / "cuts.jsonl", [line]), "--audio")

    def test_libsndfile_reads_sphere_files_or_says_why_not(self, here: Path) -> None:
        (line,) = lines_of(here, 1)
        audio, path = noise(1.0), here / "a.sph"
        soundfile.write(path, audio, 16_000, format="NIST", subtype="PCM_16")
        line["recording"]["sources"][0]["source"] = str(path)
        manifest = written(here / "cuts.jsonl", [line])
        assert command("data", "validate", manifest, "--audio").returncode == 0
        path.write_bytes(
            path.read_bytes().replace(b"sample_coding -s3 pcm", b"sample_coding -s21 pcm,embedded-shorten")
        )
        assert f"u00 ({path}): not readable as audio: " in error_of("data", "validate", manifest, "--audio")


AUDIT = """
import os, sys
EVENTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "socket.connect"}
def record(event, arguments):
    if event in EVENTS:
        with open(os.environ["AUDIT_LOG"], "a") as log:
            print(event, repr(arguments), file=log)
sys.addaudithook(record)
"""


def audited(folder: Path, *arguments: object) -> tuple[list[str], Any]:
    """A command in a process of its own, and the programs and connections that it and its workers started."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "audit.py").write_text(AUDIT)
    log = folder / "audit.log"
    script = (
        f"import sys, os; os.environ['AUDIT_LOG'] = {str(log)!r}; sys.path.insert(0, {str(folder / 'site')!r}); "
        "import audit; from w2vscale.cli.app import main; main()"
    )
    done = command(*arguments, script=script)
    return (log.read_text().splitlines() if log.exists() else []), done


def test_the_audit_would_notice(here: Path) -> None:
    (here / "site").mkdir()
    (here / "site" / "audit.py").write_text(AUDIT)
    script = (
        f"import os, sys; os.environ['AUDIT_LOG'] = {str(here / 'audit.log')!r}; "
        f"sys.path.insert(0, {str(here / 'site')!r}); import audit; os.system('true'); "
        "import subprocess; subprocess.run(['true'])"
    )
    command(script=script)
    assert len((here / "audit.log").read_text().splitlines()) >= 2


class TestShards:
    @pytest.fixture
    def shards(self, here: Path) -> Path:
        cuts = [cut_of(write_audio(here / f"u{n}.flac", noise(2.0, seed=n))) for n in range(4)]
        write_shards(write_manifest(here / "cuts.jsonl", cuts), here / "shards")
        return here / "shards"

    def windows(self, folder: Path) -> list[list[MicroBatch]]:
        settings = ["data.mode=stream", "data.max_seconds=3", "data.workers=0", "batch.max_seconds=10"]
        config = load_config("tiny", [*settings, "batch.micro_batches=2"])
        data = config.data.model_copy(update={"train": [folder]})
        assemble = Assembler(build_objective(config), config.model, seed=0)
        index_shards(folder)
        stream = open_stream(assemble, model=config.model, data=data, batch=config.batch)
        return list(stream.windows(range(2), micro_batches=2, rank=0, world_size=1))

    def error_of_reading(self, folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            self.windows(folder)
        return str(caught.value)

    @pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "placeholder"])
    def test_the_manifest_cannot_name_other_audio(self, attack: str, shards: Path) -> None:
        path = shards / "cuts.000000.jsonl.gz"
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        lines[1] |= ATTACKS[attack](lines[1])
        path.write_bytes(gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines)))
        assert self.error_of_reading(shards).startswith(f"{path}: line 2: has audio of type ")

    @pytest.mark.parametrize("attack", ["command", "url", "second source", "impulse response", "file"])
    def test_the_json_beside_the_audio_cannot_either(self, attack: str, shards: Path) -> None:
        attacks = {**ATTACKS, "file": lambda cut: {"recording": recording(cut, source("file", "/etc/passwd"))}}
        path, changed = shards / "recording.000000.tar", io.BytesIO()
        with tarfile.open(path) as old, tarfile.open(fileobj=changed, mode="w") as new:
            for member in old:
                stored = old.extractfile(member)
                assert stored is not None
                content = stored.read()
                if member.name.endswith(".json"):
                    content = json.dumps(attacks[attack]({"recording": json.loads(content)})["recording"]).encode()
                    member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        path.write_bytes(changed.getvalue())
        message = self.error_of_reading(shards)
        assert message.startswith(f"{path}: u")
        assert "but only the audio in the archive is read, and nothing is run or downloaded" in message

    def test_a_folder_whose_name_is_a_command_is_a_folder(self, shards: Path) -> None:
        manifest = shards.parent / "cuts.jsonl"
        moved = shards.rename(f"pipe:touch {MARKER};")
        assert all(batch.utterances and not batch.bad for window in self.windows(moved) for batch in window)
        assert command("data", "shar", manifest, f"pipe:touch {MARKER}; cat >").returncode == 0
        assert "cannot be written to a path with a %" in error_of("data", "shar", manifest, "shards%d")
