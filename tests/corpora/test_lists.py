"""Lists of other toolkits: Kaldi's data folders, NeMo's manifests and fairseq's .tsv files. Each of them trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import CutSet
from lhotse.cut import Cut

from tests.corpora.test_folder import error_of
from tests.corpora.test_named import said
from tests.helpers.audio import noise, write_audio
from tests.helpers.trained import trains
from w2vscale.corpora.index import build_index
from w2vscale.corpora.kaldi import WITHOUT_TEXT, WITHOUT_UTTERANCE
from w2vscale.corpora.lists import WITHOUT_AUDIO, WITHOUT_SEGMENT, prepare_fairseq, prepare_kaldi, prepare_nemo
from w2vscale.corpora.preparing import Options
from w2vscale.corpora.report import Report
from w2vscale.corpora.validate import validate_manifest


def cuts_in(report: Report) -> dict[str, Cut]:
    (manifest,) = report.manifests
    build_index(manifest.path)
    assert validate_manifest(manifest.path, audio=True).bad == 0
    return {cut.id: cut for cut in CutSet.from_file(manifest.path)}


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """A long recording, two short ones, and one with two channels."""
    write_audio(tmp_path / "audio" / "long.flac", noise(9.0, seed=1))
    for number in range(2):
        write_audio(tmp_path / "audio" / "spk" / f"take {number}.wav", noise(1.5, seed=number))
    stereo = np.stack([noise(2.0, seed=4), noise(2.0, seed=5)], axis=1)
    write_audio(tmp_path / "audio" / "call.wav", stereo)
    return tmp_path / "audio"


class TestKaldi:
    def write(self, folder: Path, **files: str) -> Path:
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("wav_scp", "wav.scp")).write_text(content, encoding="utf-8")
        return folder

    def test_segments_texts_speakers_and_commands_that_only_decode(self, audio: Path, tmp_path: Path) -> None:
        data = self.write(
            tmp_path / "train",
            wav_scp=f"call-A sph2pipe -f wav -p -c 1 {audio}/call.wav |\n"
            f"call-B sph2pipe -p -f wav -c 2 {audio}/call.wav|\n"
            f"long flac -c -d -s {audio}/long.flac |\n"
            f"take sox '{audio}/spk/take 0.wav' -r 8000 -c 1 -t wav - |\n",
            segments="call-A-1 call-A 0 2\ncall-B-1 call-B 0.5 -1\nlong-1 long 0.25 2.5\nlong-2 long 4 9.05\n"
            "take-1 take 0 1.5\nabsent-1 absent 0 1\n",
            text="long-1 zwei  Töne\nlong-2 drei\ncall-A-1 vier\n",
            utt2spk="long-1 anna\ncall-A-1 bert\n",
            utt2lang="long-1 de\n",
        )
        report = prepare_kaldi(data, tmp_path / "out")
        found = cuts_in(report)
        assert {cut.id: (cut.start, cut.duration) for cut in found.values()} == {
            "call-A-1": (0.0, 2.0),
            "call-B-1": (0.5, 1.5),
            "long-1": (0.25, 2.25),
            "long-2": (4.0, 5.0),
            "take-1": (0.0, 1.5),
        }
        assert (found["call-A-1"].channel, found["call-B-1"].channel) == (0, 1)
        assert said(found["long-1"]) == ("zwei  Töne", "anna", "de")
        assert report.notes[WITHOUT_AUDIO] == 1
        trains(report.manifests[0].path, tmp_path / "exp")

    def test_channels_of_segments(self, audio: Path, tmp_path: Path) -> None:
        data = self.write(
            tmp_path / "train",
            wav_scp=f"call {audio}/call.wav\nright sph2pipe -p -f wav -c 2 {audio}/call.wav |\n",
            segments="a call 0 1 0\nb call 0 -1 1\nc call 0 1\nd call 0 1 2\ne right 0 1 0\nf right 0 1 1\n",
        )
        report = prepare_kaldi(data, tmp_path / "out", options=Options(channel=0))
        assert {name: cut.channel for name, cut in cuts_in(report).items()} == {"a": 0, "b": 1, "c": 0, "e": 1}
        assert [(one.kind, one.reason) for one in report.unusable] == [
            ("mismatched", "f is in channel 1, but the command in wav.scp takes one channel of the file"),
            ("mismatched", "has 2 channels, numbered from 0, and no channel 2"),
        ]

    def test_utterances_without_text_and_texts_without_utterance_are_counted(self, audio: Path, tmp_path: Path) -> None:
        data = self.write(tmp_path / "train", wav_scp=f"long {audio}/long.flac\n", segments="a long 0 1\nb long 1 2\n")
        assert +prepare_kaldi(data, tmp_path / "out").notes == {}
        self.write(data, text="a eins\nc drei\nlong alles\n")
        report = prepare_kaldi(data, tmp_path / "out")
        assert {name: said(cut)[0] for name, cut in cuts_in(report).items()} == {"a": "eins", "b": None}
        assert +report.notes == {WITHOUT_TEXT: 1, WITHOUT_UTTERANCE: 2}
        (data / "segments").unlink()
        report = prepare_kaldi(data, tmp_path / "out")
        assert said(cuts_in(report)["long"])[0] == "alles" and +report.notes == {WITHOUT_UTTERANCE: 2}

    def test_the_utterances_of_audio_that_is_not_read_are_counted(self, audio: Path, tmp_path: Path) -> None:
        file = audio / "long.flac"
        data = self.write(
            tmp_path / "train",
            wav_scp=f"a {file}\nb sox {file} -t wav - speed 1.1 |\nc {file}.ark:12\nd {file}\n",
            segments="a-1 a 0 1\nb-1 b 0 1\nb-2 b 1 2\n",
        )
        report = prepare_kaldi(data, tmp_path / "out")
        (one,) = report.unusable
        assert (one.path, one.units) == ("wav.scp", 2) and one.reason.startswith(f"b: sox {file} -t wav - speed 1.1 |:")
        assert report.rows()[1][:2] == (".scp", 1) and report.rows()[1][2].startswith("2 utterances left out: wav.scp:")
        assert +report.notes == {WITHOUT_SEGMENT: 2}

    def test_without_segments_each_recording_is_an_utterance(
        self, audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = self.write(tmp_path / "data", wav_scp="take0 ../audio/spk/take 0.wav\n", text="take0 ein Wort\n")
        assert said(cuts_in(prepare_kaldi(data, tmp_path / "out"))["take0"])[0] == "ein Wort"
        monkeypatch.chdir(tmp_path)
        self.write(data, wav_scp="take0 audio/spk/take 0.wav\n")
        assert list(cuts_in(prepare_kaldi(data, tmp_path / "out"))) == ["take0"]

    @pytest.mark.parametrize(
        "command",
        [
            "touch {marker} |",
            "cat {file} | touch {marker} |",
            "sox {file} -t wav - trim 0 1 |",
            "sox {file} -t wav - remix 2 |",
            "ffmpeg -ss 3 -i {file} -f wav - |",
            "sph2pipe -f wav -p -t 1:2 {file} |",
            "flac -cd --skip=3 {file} |",
            "cat {file} {file} |",
            "sox 'unclosed |",
            "-",
            "{file}.ark:1234",
        ],
    )
    def test_other_commands_are_named_and_never_run(self, command: str, audio: Path, tmp_path: Path) -> None:
        marker, file = tmp_path / "marker", audio / "long.flac"
        data = self.write(tmp_path / "data", wav_scp=f"a {command.format(marker=marker, file=file)}\nb {file}\n")
        report = prepare_kaldi(data, tmp_path / "out")
        assert [one.kind for one in report.unusable] == ["command"] and report.manifests[0].utterances == 1
        assert not marker.exists()

    def test_mistakes(self, audio: Path, tmp_path: Path) -> None:
        message = error_of(prepare_kaldi, audio, tmp_path / "out")
        assert message.startswith(f"{audio / 'wav.scp'}: no such file")
        data = self.write(tmp_path / "data", wav_scp=f"a {audio}/long.flac\n", segments="a-1 a 0\n")
        assert "segments: line 1 is not: utterance recording start end [channel]" in error_of(
            prepare_kaldi, data, tmp_path / "out"
        )
        self.write(data, segments="a-1 a 3 2\na-2 a 8 12\na-3 a 1 2\na-4 a x 2\na-3 a 2 3\n")
        report = prepare_kaldi(data, tmp_path / "out")
        assert [one.reason for one in report.unusable] == [
            "line 4 is not: utterance recording start end [channel]",
            "line 5: the utterance a-3 occurs twice",
            "a-1 lasts from 3 to 2 s",
            "a-2 ends at 12.00 s, but the audio ends at 9.00 s",
        ]
        self.write(data, text="a-3 eins\na-2 zwei\na-3 drei\n")
        assert error_of(prepare_kaldi, data, tmp_path / "out") == f"{data / 'text'}: line 3: a-3 occurs twice"
        (data / "text").write_bytes("a-3 schön\n".encode("latin-1"))
        assert "text: line 1 is not UTF-8" in error_of(prepare_kaldi, data, tmp_path / "out")
        assert said(cuts_in(prepare_kaldi(data, tmp_path / "out", encoding="latin-1"))["a-3"])[0] == "schön"


class TestNemo:
    def write(self, path: Path, *entries: Any) -> Path:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return path

    def test_offsets_texts_and_relative_paths(self, audio: Path, tmp_path: Path) -> None:
        manifest = self.write(
            tmp_path / "train_manifest.json",
            {"audio_filepath": "audio/long.flac", "offset": 1.5, "duration": 2.0, "text": "eins", "lang": "de"},
            {"audio_filepath": "audio/long.flac", "offset": 4, "duration": 3, "text": "zwei", "speaker": 7},
            {"audio_filepath": str(audio / "spk" / "take 1.wav"), "duration": 1.4999, "text": ""},
            {"audio_filepath": "audio/call.wav"},
        )
        report = prepare_nemo(manifest, tmp_path / "out")
        found = cuts_in(report)
        assert report.manifests[0].path.name == "cuts_train_manifest.jsonl"
        assert {cut.id.rpartition("-audio-")[2]: (cut.start, cut.duration) for cut in found.values()} == {
            "audio-long": (1.5, 2.0),
            "audio-long-1": (4.0, 3.0),
            "spk-take 1": (0.0, 1.5),
            "audio-call": (0.0, 2.0),
        }
        assert said(found["audio-long-1"]) == ("zwei", "7", None) and said(found["audio-long"])[2] == "de"
        trains(report.manifests[0].path, tmp_path / "exp")

    def test_durations_without_an_offset_and_ids_that_repeat(self, audio: Path, tmp_path: Path) -> None:
        long, short = str(audio / "long.flac"), str(audio / "spk" / "take 1.wav")
        manifest = self.write(
            tmp_path / "m.jsonl",
            {"audio_filepath": long, "duration": 3.0, "text": "the first three seconds", "id": "a"},
            {"audio_filepath": short, "duration": 1.45, "text": ["two", "words"], "id": "a"},
            {"audio_filepath": str(audio / "call.wav"), "id": "a-1", "channel_selector": 1},
            {"audio_filepath": short, "duration": 2.5, "id": "too long"},
        )
        report = prepare_nemo(manifest, tmp_path / "out")
        found = cuts_in(report)
        assert {name: cut.duration for name, cut in found.items()} == {"a": 3.0, "a-1": 1.5, "a-1-1": 2.0}
        assert (found["a-1-1"].channel, said(found["a-1"])[0]) == (1, "two words")
        assert [one.reason for one in report.unusable] == ["too long ends at 2.50 s, but the audio ends at 1.50 s"]

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"audio": "x.wav"}, "line 1 is not an utterance of NeMo: it is no object with a string audio_filepath"),
            ({"audio_filepath": ["a.wav"]}, "it is no object with a string audio_filepath"),
            ([1], "line 1 is not an utterance of NeMo"),
            (
                {"audio_filepath": "a.wav", "text": True},
                "no utterance in it; x.jsonl: line 1: text is not a string: true",
            ),
            ({"audio_filepath": "a.wav", "shard_id": 0}, "line 1 is of audio in a tar archive"),
        ],
    )
    def test_lines_of_another_form(self, entry: object, message: str, tmp_path: Path) -> None:
        manifest = self.write(tmp_path / "x.jsonl", entry)
        assert message in error_of(prepare_nemo, manifest, tmp_path / "out")

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"text": {"x": 1}}, 'text is not a string: {"x": 1}'),
            ({"text": ["a", 1]}, 'text is not a string: ["a", 1]'),
            ({"text": 7}, "text is not a string: 7"),
            ({"lang": 7}, "lang is not a string: 7"),
            ({"speaker": True}, "speaker is not a string: true"),
            ({"id": [1]}, "id is not a string: [1]"),
            ({"offset": True}, "offset is not a number: true"),
            ({"offset": "x"}, 'offset is not a number: "x"'),
            ({"duration": 10**400}, f"duration is not a number: 1{'0' * 163}"),
            ({"channel_selector": -1}, "channel_selector is not the number of a channel: -1"),
            ({"channel_selector": True}, "channel_selector is not the number of a channel: true"),
            ({"channel_selector": "average"}, 'channel_selector is not the number of a channel: "average"'),
            ({"audio_filepath": "a\0.wav"}, "audio_filepath has a zero character"),
            ({"text": "\ud800"}, "'utf-8' codec can't encode character '\\ud800'"),
        ],
    )
    def test_a_field_that_is_wrong_loses_its_utterance_alone(
        self, fields: dict[str, Any], reason: str, audio: Path, tmp_path: Path
    ) -> None:
        good = {"audio_filepath": "audio/long.flac", "text": ["one", "two"], "speaker": 7, "id": 1.5}
        manifest = self.write(tmp_path / "x.jsonl", good, {"audio_filepath": "audio/long.flac", **fields})
        report = prepare_nemo(manifest, tmp_path / "out")
        ((name, cut),) = cuts_in(report).items()
        assert (name, *said(cut)) == ("1.5", "one two", "7", None)
        (one,) = report.unusable
        assert one.path == "x.jsonl" and one.reason.startswith(f"line 2: {reason}"[:200])

    def test_a_missing_manifest_suggests_another(self, tmp_path: Path) -> None:
        self.write(tmp_path / "train.jsonl", {})
        message = error_of(prepare_nemo, tmp_path / "trian.jsonl", tmp_path / "out")
        assert message == f"{tmp_path / 'trian.jsonl'}: no such file; did you mean {tmp_path / 'train.jsonl'}?"


class TestFairseq:
    def test_paths_and_letters(self, audio: Path, tmp_path: Path) -> None:
        (tmp_path / "train.tsv").write_text(f"{audio}\nlong.flac\t144000\nspk/take 0.wav\t24000\n")
        (tmp_path / "train.ltr").write_text("Z W E I | T Ö N E |\nD R E I |\n", encoding="utf-8")
        report = prepare_fairseq(tmp_path / "train.tsv", tmp_path / "out")
        found = cuts_in(report)
        assert said(found["long"]) == ("ZWEI TÖNE", None, None) and said(found["spk-take 0"]) == ("DREI", "spk", None)
        trains(report.manifests[0].path, tmp_path / "exp")
        (tmp_path / "train.wrd").write_text("ZWEI TÖNE\u2028X\nDREI\n", encoding="utf-8")
        assert said(cuts_in(prepare_fairseq(tmp_path / "train.tsv", tmp_path / "out"))["long"])[0] == "ZWEI TÖNE\u2028X"

    def test_each_line_has_its_number_of_samples_and_its_path_as_it_is_written(
        self, audio: Path, tmp_path: Path
    ) -> None:
        write_audio(audio / " a .wav", noise(1.0))
        (tmp_path / "t.tsv").write_text(
            f"{audio}\r\nlong.flac\t999\r\n\r\nlong.flac\t144000\r\n a .wav\t16000\r\ncall.wav\tx\r\n"
        )
        report = prepare_fairseq(tmp_path / "t.tsv", tmp_path / "out")
        assert set(cuts_in(report)) == {"long-1", " a "}
        assert [(one.path, one.reason) for one in report.unusable] == [
            (str(tmp_path / "t.tsv"), "line 6 has no path, or 'x' is not a number of samples"),
            ("long.flac", "has 144000 samples, but its list says 999"),
        ]

    def test_mistakes(self, audio: Path, tmp_path: Path) -> None:
        manifest = tmp_path / "train.tsv"
        manifest.write_text("")
        assert "has no utterance" in error_of(prepare_fairseq, manifest, tmp_path / "out")
        manifest.write_text("audio\nlong.flac 144000\n")
        assert "line 2 is not a path, a tab, and a number of samples" in error_of(
            prepare_fairseq, manifest, tmp_path / "out"
        )
        manifest.write_text("long.flac\t9\nlong.flac\t144000\n")
        message = f"{manifest}: line 1 must be the folder of the audio, and 'long.flac\\t9' is none"
        assert error_of(prepare_fairseq, manifest, tmp_path / "out") == message
        letters = tmp_path / "train.ltr"
        message = f"{letters}: has transcripts; give the file with the paths: {manifest}"
        assert error_of(prepare_fairseq, letters, tmp_path / "out") == message
        manifest.write_text("audio\nlong.flac\t144000\ngone.flac\t1\nspk/take 1.wav\t999\n")
        (tmp_path / "train.wrd").write_text("EINS\n")
        assert "has 1 lines for the 3 utterances of train.tsv" in error_of(prepare_fairseq, manifest, tmp_path / "out")
        (tmp_path / "train.wrd").unlink()
        report = prepare_fairseq(manifest, tmp_path / "out")
        assert [(one.path, one.reason) for one in report.unusable] == [
            ("gone.flac", "no such file"),
            ("spk/take 1.wav", "has 24000 samples, but its list says 999"),
        ]
