"""Which utterances transcribe and features find: those of prepare, each with a name of its own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.containers import write_container
from w2vscale.corpora.folder import prepare_folder
from w2vscale.data.decoding import AudioError
from w2vscale.inference.utterances import find_utterances


def names_of(*paths: Path) -> list[str]:
    return [one.name for one in find_utterances(paths)]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_files_of_a_folder_are_those_of_prepare(mixed_audio: Path, tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    write_audio(folder / "a" / "one.wav", noise(1.0))
    write_container(folder / "a" / "b" / "two.m4a", noise(1.0, rate=48_000))
    write_text(folder / "notes.txt")
    write_text(folder / "._one.wav")
    os.symlink(mixed_audio, folder / "linked")
    os.symlink(folder, folder / "a" / "loop")
    os.symlink("one.wav", folder / "a" / "same.wav")
    os.mkfifo(folder / "pipe.wav")
    (written,) = prepare_folder(folder, tmp_path / "out").manifests
    prepared = [cut.recording.sources[0].source for cut in CutSet.from_file(written.path)]
    found = find_utterances([folder])
    assert [one.file for one in found] == prepared
    assert len(found) == 8
    assert names_of(folder)[:2] == ["a/b/two", "a/one"]


def test_a_broken_link_and_a_name_that_is_no_text_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    write_audio(folder / "a.wav", noise(1.0))
    os.symlink("gone.wav", folder / "link.wav")
    os.rename(write_audio(folder / "b.wav", noise(1.0)), os.fsencode(folder) + b"/\xff.wav")
    reasons = {}
    for one in find_utterances([folder]):
        try:
            one.open()
        except AudioError as error:
            reasons[one.name] = str(error)
    assert reasons == {"link.wav": "broken link", "\udcff": "its name is not UTF-8: rename it"}


def test_files_with_one_name_are_told_apart_by_suffix_and_then_by_path(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    touch(one / "a.wav", one / "a.flac", one / "b.mp3", two / "a.wav", two / "b.ogg", two / "c.ogg")
    assert names_of(one) == ["a.flac", "a.wav", "b"]
    here = str(tmp_path).lstrip("/")
    assert names_of(one, two) == ["a.flac", f"{here}/one/a.wav", "b.mp3", f"{here}/two/a.wav", "b.ogg", "c"]
    assert names_of(one / "b.mp3", two / "b.ogg", two / "c.ogg") == ["b.mp3", "b.ogg", "c"]
    assert names_of(one / "a.wav", two / "a.wav") == [f"{here}/one/a.wav", f"{here}/two/a.wav"]


@given(
    files=st.lists(
        st.tuples(st.sampled_from("xy"), st.sampled_from(["", "d/"]), st.sampled_from(["a", "b", "a.wav", "é 'n"]),
                  st.sampled_from([".wav", ".WAV", ".flac", ".m4a"])),
        min_size=1, max_size=12, unique=True,
    )
)  # fmt: skip
def test_every_file_of_several_folders_has_a_name_of_its_own(
    files: list[tuple[str, str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    top = tmp_path_factory.mktemp("folders")
    paths = {top / folder / f"{below}{stem}{suffix}" for folder, below, stem, suffix in files}
    touch(*paths)
    found = find_utterances(sorted({top / folder for folder, *_ in files}))
    assert {Path(one.file) for one in found} == paths
    assert len({one.name for one in found}) == len(found) == len(paths)
    assert all(one.name in one.file for one in found)


@pytest.mark.parametrize("name", ["no suffix", "talk.jsonl.wav", "-o.wav", "new\nline.wav", "a.b.dat", "[x] 'y'.FLAC"])
def test_a_file_that_is_given_by_its_name_is_tried_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.flac", noise(1.5)).rename(tmp_path / name)
    (found,) = find_utterances([path])
    audio = found.open()
    assert (audio.sampling_rate, audio.samples) == (16_000, 24_000)
    assert sum(len(block) for block in audio.blocks()) == 24_000


@pytest.mark.parametrize(("name", "reason"), [("pipe.wav", "no such file"), ("notes.pdf", "not readable as audio: ")])
def test_what_is_no_audio_is_named_when_it_is_opened(name: str, reason: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    write_text(tmp_path / "notes.pdf")
    (found,) = find_utterances([tmp_path / name])
    with pytest.raises(AudioError, match=reason):
        found.open()


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_audio(tmp_path / "good.wav", noise(1.0))
    here = os.getcwd()
    try:  # a path that is too long for the system, whoever the user is
        os.chdir(tmp_path)
        for _ in range(25):
            os.mkdir("y" * 200)
            os.chdir("y" * 200)
        good, bad = find_utterances([tmp_path])
    finally:
        os.chdir(here)
    assert good.name == "good" and bad.file.startswith(f"{tmp_path}/yyy")
    with pytest.raises(AudioError, match=r"^cannot be read: File name too long$"):
        bad.open()


def test_folders_files_and_manifests_together(tmp_path: Path) -> None:
    first = write_audio(tmp_path / "audio" / "a.wav", noise(1.0))
    second = write_audio(tmp_path / "b.ogg", noise(1.0))
    manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(first).with_id("id/1")])
    found = find_utterances([tmp_path / "audio", second, manifest])
    assert [(one.name, one.file) for one in found] == [("a", str(first)), ("b", str(second)), ("id/1", str(first))]


class TestChannels:
    def test_each_channel_and_their_mean(self, tmp_path: Path) -> None:
        left, right = noise(1.5, seed=1), noise(1.5, seed=2)
        path = write_audio(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT")
        for channel, expected in ((None, (left + right) / 2), (0, left), (1, right)):
            (found,) = find_utterances([path], channel=channel)
            np.testing.assert_allclose(np.concatenate([*found.open().blocks()]), expected, atol=1e-7)

    def test_a_channel_that_a_file_lacks(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "a.wav", np.stack([noise(1.0), noise(1.0)], axis=1))
        (found,) = find_utterances([path], channel=2)
        with pytest.raises(AudioError, match=r"^has 2 channels, numbered from 0, and no channel 2$"):
            found.open()

    def test_channels_that_cancel(self, tmp_path: Path) -> None:
        path = write_audio(tmp_path / "a.wav", np.stack([noise(1.0), -noise(1.0)], axis=1))
        (found,) = find_utterances([path])
        with pytest.raises(AudioError, match="cancel each other") as caught:
            [*found.open().blocks()]
        assert caught.value.kind == "cancelling"
        (found,) = find_utterances([path], channel=1)
        assert sum(map(len, found.open().blocks())) == 16_000
