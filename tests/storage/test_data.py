"""Manifests and audio by URL: cuts and samples are those of files, and nothing is opened that the settings forbid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import Recording
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from lhotse.utils import fastcopy

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.batches import config_with, dataset_of
from tests.helpers.commands import error_of
from tests.helpers.micro import MICRO_RUN
from tests.helpers.stores import free_port
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.corpora.index import build_index
from w2vscale.corpora.relocate import relocate
from w2vscale.data import audio as audio_module
from w2vscale.data.audio import AudioError, read_audio
from w2vscale.data.decoding import Fetched
from w2vscale.data.manifest import Corpus, Manifest, index_url
from w2vscale.errors import TemporaryError, UserError
from w2vscale.storage import objects
from w2vscale.storage.objects import list_objects, upload, write
from w2vscale.storage.urls import Url
from w2vscale.training.train import train

SCHEMES = ("file", "s3")


def moved(folder: Path, bucket: Url, *, count: int = 6, index: bool = True) -> tuple[Path, Url]:
    """A manifest of files, and one of the same audio in the store."""
    cuts = [cut_of(write_audio(folder / "audio" / f"u{n}.flac", noise(1.0 + n % 3, seed=n))) for n in range(count)]
    files = write_manifest(folder / "files.jsonl", cuts)
    for path in (folder / "audio").iterdir():
        upload(path, bucket / "audio" / path.name)
    shutil.copy(files, folder / "cuts.jsonl")
    relocate([folder / "cuts.jsonl"], folder / "audio", bucket / "audio")
    upload(folder / "cuts.jsonl", bucket / "cuts.jsonl")
    if index:
        build_index(bucket / "cuts.jsonl", schemes=SCHEMES)
    return files, bucket / "cuts.jsonl"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_command(*arguments: object) -> None:
    app(args=[str(argument) for argument in arguments], standalone_mode=False)


class TestManifests:
    def test_a_manifest_at_a_url_has_the_same_cuts(self, bucket: Url, tmp_path: Path) -> None:
        files, url = moved(tmp_path, bucket)
        local, remote = Corpus([files]), Corpus([url], schemes=SCHEMES)
        assert np.array_equal(local.durations, remote.durations)
        assert [remote.cut(number).id for number in range(6)] == [local.cut(number).id for number in range(6)]
        assert str(remote.manifests[0].path) == url

    def test_an_index_is_written_beside_it(self, bucket: Url, tmp_path: Path, capsys: Any) -> None:
        _, url = moved(tmp_path, bucket, index=False)
        with pytest.raises(UserError, match=f"has no index; create it with: w2vscale data index {url}"):
            Manifest(url, schemes=SCHEMES)
        run_command("data", "index", url, "--url-scheme", "s3")
        assert index_url(url) in capsys.readouterr().out
        assert "cuts.jsonl.index.npy" in list_objects(bucket)
        assert len(Manifest(url, schemes=SCHEMES)) == 6

    def test_a_changed_manifest_is_noticed_and_copied_again(self, bucket: Url, tmp_path: Path) -> None:
        _, url = moved(tmp_path, bucket)
        lines = (tmp_path / "cuts.jsonl").read_bytes().splitlines(keepends=True)
        write(url, b"".join(lines[:4]))
        with pytest.raises(UserError, match=f"{url}: changed since it was indexed"):
            Manifest(url, schemes=SCHEMES)
        assert build_index(url, schemes=SCHEMES) == 4
        assert len(Manifest(url, schemes=SCHEMES)) == 4

    def test_errors_name_the_url(self, bucket: Url, tmp_path: Path) -> None:
        write(bucket / "bad.jsonl", b'{"id": 1}\n')
        assert error_of("data", "index", bucket / "bad.jsonl").startswith(
            f"{bucket}/bad.jsonl: line 1 is not a Lhotse cut"
        )
        assert error_of("data", "index", bucket / "no.jsonl").startswith(f"{bucket}/no.jsonl: no such object")
        assert "only uncompressed JSONL" in error_of("data", "index", bucket / "cuts.jsonl.gz")

    def test_other_commands(self, bucket: Url, tmp_path: Path, capsys: Any) -> None:
        _, url = moved(tmp_path, bucket)
        run_command("data", "validate", url, "--audio", "--url-scheme", "s3", "--jobs", 2)
        settings = ("--set", "data.url_schemes=[file,s3]", "--set", "data.min_seconds=0.5")
        run_command("data", "stats", url, "--config", "tiny", *settings)
        printed = capsys.readouterr().out
        assert "no problem found in 6 utterances" in printed and "6 " in printed

    def test_validation_names_the_url_and_lists_in_the_current_folder(
        self, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        _, url = moved(tmp_path, bucket, count=2)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        run_command("data", "validate", url, "--url-scheme", "s3", "--jobs", 1)
        assert capsys.readouterr().out.replace("\n", "").startswith(f"{url}: no problem found")
        objects.delete([bucket / "audio" / "u1.flac"])
        error = error_of("data", "validate", url, "--url-scheme", "s3", "--jobs", 1)
        assert error.startswith(f"{url}: 1 bad utterance of 2, listed in cuts.jsonl.bad_headers; ")
        assert len(lines_of(tmp_path / "here" / "cuts.jsonl.bad_headers")) == 1
        write(bucket / "bad.jsonl", b'{"id": 1}\n')
        assert error_of("data", "validate", bucket / "bad.jsonl").startswith(f"{bucket}/bad.jsonl: ")

    def test_back_to_files(self, bucket: Url, tmp_path: Path) -> None:
        files, _ = moved(tmp_path, bucket)
        (found,) = relocate([tmp_path / "cuts.jsonl"], bucket / "audio", tmp_path / "audio").values()
        assert found == (6, 0, 0)
        assert lines_of(tmp_path / "cuts.jsonl") == lines_of(files)

    def test_audio_that_was_not_moved(self, bucket: Url, tmp_path: Path) -> None:
        moved(tmp_path, bucket)
        (tmp_path / "files.jsonl").rename(tmp_path / "again.jsonl")
        with pytest.raises(UserError, match="would be its first file: no such file"):
            relocate([tmp_path / "again.jsonl"], tmp_path / "audio", bucket / "elsewhere")


def at_url(cut: Cut, url: Url) -> Cut:
    """The cut with its audio at a URL."""
    recording = cut.recording
    sources = [AudioSource("url", source.channels, str(url)) for source in recording.sources]
    return fastcopy(cut, recording=fastcopy(recording, sources=sources))


class TestAudio:
    @pytest.mark.parametrize("suffix", [".flac", ".wav", ".mp3", ".ogg", ".opus", ".m4a"])
    @pytest.mark.parametrize("rate", [16_000, 8_000])
    def test_the_samples_are_those_of_the_file(self, suffix: str, rate: int, bucket: Url, tmp_path: Path) -> None:
        path = tmp_path / f"a{suffix}"
        if suffix == ".m4a":
            av = pytest.importorskip("av")
            with av.open(str(path), "w") as container:
                stream = container.add_stream("aac", rate=16_000)
                stream.layout = "mono"
                frame = av.AudioFrame.from_ndarray(noise(2.0)[None], format="fltp", layout="mono")
                frame.sample_rate = 16_000
                for packet in (*stream.encode(frame), *stream.encode(None)):
                    container.mux(packet)
        else:
            write_audio(path, noise(2.0))
        cut = Recording(
            "a", [AudioSource("file", [0], str(path))], 16_000, round(2.0 * 16_000), 2.0
        ).to_cut()  # fmt: skip
        upload(path, bucket / "folder" / path.name)
        there = at_url(cut, bucket / "folder" / path.name)
        for part in ({}, {"offset": rate // 2, "length": rate}, {"offset": 100, "length": rate, "normalize": True}):
            ours, expected = (read_audio(one, sampling_rate=rate, **part) for one in (there, cut))  # type: ignore[arg-type]
            assert np.array_equal(ours, expected)

    def test_what_is_wrong_with_one_object_is_bad_audio(
        self, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_audio(tmp_path / "a.wav", noise(2.0))
        content, cut = path.read_bytes(), cut_of(path)
        write(bucket / "short.wav", content[:-20_000])
        write(bucket / "noise.wav", b"this is not audio" * 50)
        write(bucket / "empty.wav", b"")
        write(bucket / "other.wav", write_audio(tmp_path / "b.wav", noise(3.0)).read_bytes())
        problems = {
            "absent": "missing",
            "short": "truncated",
            "noise": "undecodable",
            "empty": "empty",
            "other": "mismatched",
        }
        for name, kind in problems.items():
            with pytest.raises(AudioError) as caught:
                read_audio(at_url(cut, bucket / f"{name}.wav"), sampling_rate=16_000)
            assert (name, caught.value.kind) == (name, kind)
        monkeypatch.setattr(audio_module, "LARGEST_OBJECT", 1000)
        with pytest.raises(AudioError, match="has more than 1,000 bytes"):
            read_audio(at_url(cut, bucket / "other.wav"), sampling_rate=16_000)

    def test_a_store_that_cannot_be_used_is_not(
        self, bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, url = moved(tmp_path, bucket)
        corpus = Corpus([url], schemes=SCHEMES)
        dataset = dataset_of(url, config_with("data.url_schemes=[file,s3]", "data.min_seconds=0.5"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setattr(objects, "_opened", {})
        with pytest.raises(TemporaryError, match="the store cannot be used now"):
            read_audio(corpus.cut(0), sampling_rate=16_000)
        with pytest.raises(TemporaryError, match="the store cannot be used now"):
            dataset[0]
        monkeypatch.setattr(objects, "_opened", {})
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(UserError, match="access denied"):
            dataset[0]


class TestWhatManifestsMayOpen:
    def test_no_url_unless_the_setting_has_its_scheme(self, bucket: Url, tmp_path: Path) -> None:
        _, url = moved(tmp_path, bucket)
        for schemes in (("file",), ("file", "https"), ("s3a",)):
            with pytest.raises(UserError, match=r"has audio of type .url. .*, which data\.url_schemes") as caught:
                Corpus([url], schemes=schemes).cut(0)
            assert "\n" not in str(caught.value)

    def test_no_file_unless_the_setting_has_file(self, bucket: Url, tmp_path: Path) -> None:
        files, _ = moved(tmp_path, bucket)
        with pytest.raises(UserError, match=r"data\.url_schemes does not have file"):
            Corpus([files], schemes=("s3",)).cut(0)

    @pytest.mark.parametrize(
        "change",
        [
            {"source": "file:///etc/passwd"},
            {"source": "pipe:touch marker"},
            {"source": "simplecache::s3://bucket/x"},
            {"source": "s3://user:secret@bucket/x"},
            {"type": "command"},
        ],
    )
    def test_other_sources_stay_forbidden(self, change: dict[str, str], bucket: Url, tmp_path: Path) -> None:
        moved(tmp_path, bucket)
        lines = lines_of(tmp_path / "cuts.jsonl")
        lines[1]["recording"]["sources"][0] |= change
        (tmp_path / "cuts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        error = error_of("data", "index", tmp_path / "cuts.jsonl", "--url-scheme", "s3")
        assert error.startswith(f"{tmp_path}/cuts.jsonl: line 2: ") and "secret" not in error

    def test_urls_that_are_nested_stay_forbidden(self, bucket: Url, tmp_path: Path) -> None:
        moved(tmp_path, bucket)
        line = lines_of(tmp_path / "cuts.jsonl")[0]
        reverb = {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": line["recording"]}}
        for nested in (
            {"custom": {"target": line["recording"]}},
            {"recording": line["recording"] | {"transforms": [reverb]}},
        ):
            (tmp_path / "nested.jsonl").write_text(json.dumps(line | nested) + "\n")
            error = error_of("data", "index", tmp_path / "nested.jsonl", "--url-scheme", "s3")
            assert "has audio of type 'url', but only files are read" in error


def settings(train_set: object, *more: str) -> Any:
    chosen = [*MICRO_RUN, f"data.train={train_set}", "data.url_schemes=[file,s3]", "trainer.updates=4"]
    return load_config("base", [*chosen, *more])


@pytest.mark.long
def test_a_run_on_urls_is_the_run_on_files(bucket: Url, tmp_path: Path) -> None:
    """With loader processes, validation, noise and impulse responses by URL."""
    files, url = moved(tmp_path, bucket, count=12)

    def trained(name: str, manifest: object) -> list[str]:
        more = [f"data.validation={manifest}", f"augment.noise={manifest}", f"augment.reverb={manifest}"]
        more += ["data.workers=2", "augment.noise_probability=0.9", "augment.reverb_probability=0.9"]
        more += ["trainer.validate_every=2", f"checkpoint.store={bucket / name}"]
        assert train(settings(manifest, *more), tmp_path / name) == 0
        assert not (tmp_path / name / "logs" / "bad_audio.jsonl").exists()
        lines = lines_of(tmp_path / name / "metrics.jsonl")
        return [json.dumps({key: value for key, value in line.items() if "loss" in key}) for line in lines]

    losses = trained("files", files)
    assert losses == trained("urls", url) and len(losses) >= 4
    assert "update_00000004/train_state.json" in list_objects(bucket / "urls")
    # The checkpoint does not say which URLs may be opened, the command does.
    cuts = tmp_path / "cuts.jsonl"
    build_index(cuts, schemes=SCHEMES)
    assert "data.url_schemes=file does not allow" in error_of("evaluate", tmp_path / "urls", "--cuts", cuts)
    run_command("evaluate", tmp_path / "urls", "data.url_schemes=[file,s3]", "--cuts", cuts)


def test_a_loader_process_that_loses_the_store_ends_the_run_for_now(
    bucket: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = moved(tmp_path, bucket, count=12)
    right = objects._Files.read

    def lost(files: Any, path: str, most: int) -> bytes:
        if path.endswith("u7.flac"):
            raise ConnectionResetError("lost")
        return right(files, path, most)

    monkeypatch.setattr(objects._Files, "read", lost)
    with pytest.raises(TemporaryError) as caught:
        train(settings(url, "data.workers=2"), tmp_path / "exp")
    message = str(caught.value)
    assert message.startswith(f"{bucket}/audio/u7.flac: the store cannot be used now") and "\n" not in message
    assert caught.value.exit_code == 75


@pytest.mark.parametrize(
    ("url", "suffix"),
    [
        ("s3://b/a#1.mp3", ".mp3"), ("s3://b/a?.m4a", ".m4a"), ("gs://b/a?x=1/b.FLAC", ".flac"),
        ("https://host/a.flac?signature=1.mp3#x", ".flac"), ("HTTP://host/a.ogg?x", ".ogg"),
    ],
)  # fmt: skip
def test_the_suffix_of_a_url(url: str, suffix: str) -> None:
    assert Fetched(url, b"").suffix == suffix


def test_deserialised_cuts_keep_their_urls(bucket: Url, tmp_path: Path) -> None:
    moved(tmp_path, bucket)
    line = lines_of(tmp_path / "cuts.jsonl")[0]
    assert deserialize_item(line).recording.sources[0].source == f"{bucket}/audio/u0.flac"
