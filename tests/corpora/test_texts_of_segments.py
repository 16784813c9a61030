"""The text of each segment of a prepared folder, from transcripts with and without times, and the error rate on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.qa import validate

from tests.helpers.audio import noise, write_audio
from tests.helpers.commands import error_of
from tests.helpers.spelled import RATE, SPELLING, some_texts, spoken
from w2vscale.cli.app import app
from w2vscale.config import load_config
from w2vscale.corpora.finding import PREFERRED, TRANSCRIPT
from w2vscale.corpora.folder import SAME_NAME, prepare_folder
from w2vscale.corpora.folder_texts import (
    AFTER_AUDIO,
    AMBIGUOUS,
    EMPTY,
    IN_SEGMENTS,
    ITS_AUDIO,
    MIXED_CHANNELS,
    NOT_A_TRANSCRIPT,
    NOT_AMONG,
    OTHER_CHANNELS,
    OVERHANGING,
    PAST_AUDIO,
    START_AFTER_AUDIO,
    WITHOUT_TIMES,
)
from w2vscale.corpora.index import build_index
from w2vscale.corpora.kaldi import WITHOUT_TEXT, WITHOUT_UTTERANCE
from w2vscale.corpora.preparing import Options
from w2vscale.corpora.report import Report
from w2vscale.corpora.segments import BEYOND_SEGMENT, Timed
from w2vscale.training.train import train

WORDS = [Timed(0.5, 1.0, "one"), Timed(1.25, 1.75, "two"), Timed(2.5, 3.25, "três"), Timed(4.5, 5.5, "four")]
SECONDS = 6.0


def as_ctm(words: Sequence[Timed]) -> str:
    return "".join(f"talk 1 {start} {end - start} {text}\n" for start, end, text, *_ in words)


def as_text_grid(words: Sequence[Timed]) -> str:
    intervals = "\n".join(f'{start}\n{end}\n"{text}"' for start, end, text, *_ in words)
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1000\n<exists>\n1\n'
    return f'{head}"IntervalTier"\n"words"\n0\n1000\n{len(words)}\n{intervals}\n'


def clock(seconds: float, point: str) -> str:
    return f"{int(seconds) // 3600:02d}:{int(seconds) // 60 % 60:02d}:{seconds % 60:06.3f}".replace(".", point)


def as_srt(words: Sequence[Timed]) -> str:
    cues = [f"{clock(start, ',')} --> {clock(end, ',')}\n{text}\n" for start, end, text, *_ in words]
    return "\n".join(f"{number}\n{cue}" for number, cue in enumerate(cues, start=1))


def as_vtt(words: Sequence[Timed]) -> str:
    return "WEBVTT\n\n" + "\n".join(
        f"{clock(start, '.')} --> {clock(end, '.')}\n{text}\n" for start, end, text, *_ in words
    )


def as_json(words: Sequence[Timed]) -> str:
    listed = [{"word": f" {text}", "start": start, "end": end} for start, end, text, *_ in words]
    return json.dumps({"segments": [{"text": "", "start": 0.0, "end": 1.0, "words": [word]} for word in listed]})


FORMATS: dict[str, Callable[[Sequence[Timed]], str]] = {
    ".ctm": as_ctm,
    ".TextGrid": as_text_grid,
    ".srt": as_srt,
    ".vtt": as_vtt,
    ".json": as_json,
}


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """A recording of six seconds, `talk.wav`, in a folder of its own."""
    return write_audio(tmp_path / "audio" / "talk.wav", noise(SECONDS))


def prepared(talk: Path, **options: Any) -> tuple[list[Cut], Report]:
    """The cuts in the order of their times, which are valid for Lhotse, and the report."""
    report = prepare_folder(talk.parent, talk.parent.parent / "out", **options)
    cuts = [*CutSet.from_file(report.manifests[0].path)]
    for cut in cuts:
        validate(cut)
        (supervision,) = cut.supervisions
        validate(supervision)
        assert (supervision.start, supervision.duration) == (0.0, cut.duration)
        assert supervision.recording_id == cut.recording_id
    assert len({cut.id for cut in cuts}) == len({cut.supervisions[0].id for cut in cuts}) == len(cuts)
    return sorted(cuts, key=lambda cut: (cut.recording_id, cut.start)), report


def texts_of(cuts: Sequence[Cut]) -> list[str | None]:
    return [cut.supervisions[0].text for cut in cuts]


class TestWithTimes:
    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("encoding", [None, "latin-1"])
    def test_each_segment_has_its_words(self, suffix: str, encoding: str | None, talk: Path) -> None:
        talk.with_suffix(suffix).write_text(FORMATS[suffix](WORDS), encoding=encoding or "utf-8")
        cuts, report = prepared(talk, segment_seconds=2.0, encoding=encoding)
        assert texts_of(cuts) == ["one two", "três", "four"]
        # The word from 4.5 s to 5.5 s is not cut at 4 s, and the second cut is in the pause before 4.5 s.
        assert [cut.start for cut in cuts] == pytest.approx([0.0, 2.0, 4.0])
        assert +report.notes == {} and not report.unusable

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_whole_recording_has_the_whole_text(self, suffix: str, talk: Path) -> None:
        talk.with_suffix(suffix).write_text(FORMATS[suffix](WORDS), encoding="utf-8")
        for options in ({}, {"segment_seconds": SECONDS}):
            cuts, _ = prepared(talk, **options)
            assert texts_of(cuts) == ["one two três four"]
            assert cuts[0].id == "talk"

    @settings(max_examples=15)  # each writes a corpus
    @given(
        steps=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 150)), max_size=25),
        suffix=st.sampled_from([*FORMATS]),
        longest=st.integers(30, 90),
    )
    def test_every_word_is_in_exactly_one_segment(
        self, steps: list[tuple[int, int]], suffix: str, longest: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        words, end = [], 0
        for number, (pause, length) in enumerate(steps):  # in hundredths of a second
            words.append(Timed((end + pause) / 100, (end + pause + length) / 100, f"w{number}"))
            end += pause + length
        folder = tmp_path_factory.mktemp("talk") / "audio"
        talk = write_audio(folder / "talk.wav", noise(max(end / 100, 0.5), rate=1000), rate=1000)
        talk.with_suffix(suffix).write_text(FORMATS[suffix](words), encoding="utf-8")
        cuts, report = prepared(talk, segment_seconds=longest / 10)
        assert " ".join(filter(None, texts_of(cuts))) == " ".join(word.text for word in words)
        assert +report.notes == ({} if words or suffix == ".json" else {EMPTY: 1})
        assert report.others == {(suffix.lower(), TRANSCRIPT if words or suffix != ".json" else NOT_A_TRANSCRIPT): 1}
        spans = {word.text: word for word in words}
        for cut in cuts:
            for word in (cut.supervisions[0].text or "").split():
                # A segment ends on a sample.
                assert cut.start - 2e-3 <= spans[word].start and spans[word].end <= cut.end + 2e-3

    def test_text_that_extends_beyond_a_segment_leaves_it_without_text_and_is_counted(self, talk: Path) -> None:
        phrase = Timed(1.0, 4.0, "a phrase that is longer than the segments")
        talk.with_suffix(".srt").write_text(as_srt([phrase, Timed(5.2, 5.7, "short")]))
        cuts, report = prepared(talk, segment_seconds=2.0)
        texts = dict(zip([round(cut.start, 2) for cut in cuts], texts_of(cuts), strict=True))
        covered = [cut for cut in cuts if cut.start < 4.0 - BEYOND_SEGMENT and cut.end > 1.0 + BEYOND_SEGMENT]
        assert [cut.supervisions[0].text for cut in covered] == [None] * len(covered)
        assert "short" in texts.values()
        assert report.notes[OVERHANGING] == len(covered) >= 2
        written = json.loads((talk.parent.parent / "out" / "prepare_report.json").read_text())
        assert written["notes"][OVERHANGING] == len(covered)

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_transcript_that_goes_on_after_the_audio_is_named(self, suffix: str, talk: Path) -> None:
        write_audio(talk.with_name("good.wav"), noise(1.0))
        late = [*WORDS, Timed(SECONDS + START_AFTER_AUDIO + 0.5, SECONDS + START_AFTER_AUDIO + 1.0, "late")]
        talk.with_suffix(suffix).write_text(FORMATS[suffix](late), encoding="utf-8")
        for options in ({}, {"segment_seconds": 2.0}):
            cuts, report = prepared(talk, **options)
            assert [cut.id for cut in cuts] == ["good"]
            reason = f"talk{suffix}: has words at 7.5 s, but the audio ends at 6.0 s"
            assert [one[:3] for one in report.unusable] == [("talk.wav", "transcript", reason)]
            assert report.others == {(suffix.lower(), ITS_AUDIO): 1}

    def test_the_last_word_may_end_a_little_after_the_audio(self, talk: Path) -> None:
        for end, notes in ((SECONDS + 0.2, {}), (SECONDS + 0.6, {PAST_AUDIO: 1})):
            late = [*WORDS[:3], Timed(SECONDS - 0.2, end, "late")]
            talk.with_suffix(".ctm").write_text(as_ctm(late), encoding="utf-8")
            assert texts_of(prepared(talk)[0]) == ["one two três late"]
            cuts, report = prepared(talk, segment_seconds=4.0)
            assert texts_of(cuts) == ["one two três", "late"]
            assert +report.notes == notes
        talk.with_suffix(".ctm").write_text(as_ctm([Timed(6.4, 6.9, "after"), *WORDS]), encoding="utf-8")
        for segment_seconds in (None, 3.5):
            cuts, report = prepared(talk, segment_seconds=segment_seconds)
            assert " ".join(filter(None, texts_of(cuts))) == "one two três four"
            assert +report.notes == {AFTER_AUDIO: 1}

    def test_empty_phrases_add_nothing(self, talk: Path) -> None:
        words = [WORDS[0], Timed(1.0, 1.2, ""), WORDS[1]]
        talk.with_suffix(".vtt").write_text(as_vtt(words))
        assert texts_of(prepared(talk)[0]) == ["one two"]
        assert texts_of(prepared(talk, segment_seconds=3.0)[0]) == ["one two", ""]


class TestWithoutTimes:
    def test_segments_of_a_split_recording_have_no_text_and_are_counted(self, talk: Path) -> None:
        write_audio(talk.with_name("short.flac"), noise(1.5))
        talk.with_suffix(".txt").write_text("ALL OF IT\n")
        talk.with_name("short.txt").write_text(" SHORT\n")
        cuts, report = prepared(talk, segment_seconds=2.0)
        assert [(cut.id, cut.supervisions[0].text) for cut in cuts] == [
            ("short", "SHORT"), ("talk-0", None), ("talk-1", None), ("talk-2", None)
        ]  # fmt: skip
        assert +report.notes == {WITHOUT_TIMES: 3}
        cuts, report = prepared(talk)
        assert texts_of(cuts) == ["SHORT", "ALL OF IT"]
        assert +report.notes == {}

    def test_a_recording_without_transcript_is_not_counted(self, talk: Path) -> None:
        cuts, report = prepared(talk, segment_seconds=2.0)
        assert texts_of(cuts) == [None] * 3
        assert +report.notes == {}

    def test_a_latin_1_transcript_is_named_and_read_with_its_encoding(self, talk: Path) -> None:
        write_audio(talk.with_name("good.wav"), noise(1.0))
        talk.with_suffix(".txt").write_bytes("três".encode("latin-1"))
        cuts, report = prepared(talk)
        assert [cut.id for cut in cuts] == ["good"]
        assert [(one.path, one.kind) for one in report.unusable] == [("talk.wav", "transcript")]
        assert report.unusable[0].reason.startswith("talk.txt: line 1 is not UTF-8")
        assert report.others == {(".txt", ITS_AUDIO): 1}
        cuts, report = prepared(talk, encoding="latin-1")
        assert texts_of(cuts) == [None, "três"] and not report.unusable

    def test_an_encoding_that_does_not_exist(self, talk: Path) -> None:
        out = talk.parent.parent / "out"
        for name in ("latin1252", "base64", "undefined", "\0"):
            message = error_of("data", "prepare", "folder", talk.parent, out, "--encoding", name)
            assert message == f"--encoding {name}: no encoding has this name; try for example latin-1 or cp1252"
        app(
            args=["data", "prepare", "folder", str(talk.parent), str(out), "--encoding", "utf-16"],
            standalone_mode=False,
        )


class TestJson:
    METADATA = '{"id": 3, "speaker": "anna", "duration": 6.0}'

    def test_metadata_is_no_transcript_and_does_not_hide_one(self, talk: Path) -> None:
        talk.with_suffix(".json").write_text(self.METADATA)
        cuts, report = prepared(talk)
        assert texts_of(cuts) == [None]
        assert not +report.notes and report.others == {(".json", NOT_A_TRANSCRIPT): 1}
        talk.with_suffix(".txt").write_text("WHAT IS SAID")
        cuts, report = prepared(talk)
        assert texts_of(cuts) == ["WHAT IS SAID"]
        assert report.others == {(".json", NOT_A_TRANSCRIPT): 1, (".txt", TRANSCRIPT): 1}

    def test_an_empty_list_is_no_transcript_and_does_not_hide_one(self, talk: Path) -> None:
        talk.with_suffix(".json").write_text('{"text": "", "segments": []}')
        talk.with_suffix(".txt").write_text("WHAT IS SAID")
        cuts, report = prepared(talk)
        assert texts_of(cuts) == ["WHAT IS SAID"]
        assert report.others == {(".json", NOT_A_TRANSCRIPT): 1, (".txt", TRANSCRIPT): 1}

    def test_words_with_times_are_preferred_to_a_text(self, talk: Path) -> None:
        talk.with_suffix(".json").write_text(as_json(WORDS))
        talk.with_suffix(".txt").write_text("OLD TEXT")
        cuts, report = prepared(talk)
        assert texts_of(cuts) == ["one two três four"]
        assert +report.notes == {}
        assert report.others == {(".json", TRANSCRIPT): 1, (".txt", PREFERRED): 1}


class TestKaldi:
    def test_segments_and_text_in_the_folder(self, talk: Path) -> None:
        write_audio(talk.parent / "day" / "two.flac", noise(3.0))
        (talk.parent / "segments").write_text(
            "t-2 talk 2.5 3.5\nt-1 talk 0.5 1.75\nt-3\ttalk\t4.5\t5.5\nu day-two 0.5 1.0\nv absent 0 1\n"
        )
        (talk.parent / "text").write_text("t-1 one  two\nt-2\ttrês\nt-3 four\nu five\nv six\n", encoding="utf-8")
        cuts, report = prepared(talk, segment_seconds=2.0)
        assert [(cut.id, cut.supervisions[0].text) for cut in cuts] == [
            ("day-two-0", "five"), ("day-two-1", ""), ("talk-0", "one  two"), ("talk-1", "três"), ("talk-2", "four")
        ]  # fmt: skip
        assert +report.notes == {NOT_AMONG: 1}
        assert report.others == {("(no suffix)", TRANSCRIPT): 2}
        talk.with_suffix(".txt").write_text("OLD TEXT")
        cuts, report = prepared(talk)
        assert texts_of(cuts) == ["five", "one  two três four"]
        assert report.others == {("(no suffix)", TRANSCRIPT): 2, (".txt", IN_SEGMENTS): 1}

    def test_an_end_of_minus_one_is_that_of_the_recording(self, talk: Path) -> None:
        (talk.parent / "segments").write_text("a talk 0.5 1.5\nb talk 4.5 -1\n")
        (talk.parent / "text").write_text("a one\nb two\n")
        cuts, report = prepared(talk, segment_seconds=2.0)
        assert texts_of(cuts) == ["one", "", "two"] and +report.notes == {}

    def test_a_name_that_several_files_have_is_the_label_of_none(self, talk: Path) -> None:
        for name in ("a/rec.wav", "b/rec.wav", "a/own.wav", "own.wav", "a/one.wav"):
            write_audio(talk.parent / name, noise(2.0))
        names = ("rec", "a-rec", "own", "one", "a-one", "gone")
        (talk.parent / "segments").write_text("".join(f"u-{name} {name} 0 1\n" for name in names))
        (talk.parent / "text").write_text("".join(f"u-{name} said in {name}\n" for name in names))
        cuts, report = prepared(talk)
        assert {cut.id: cut.supervisions[0].text for cut in cuts} == {
            "a-rec": "said in a-rec", "b-rec": None, "own": "said in own", "a-own": None, "a-one": "said in a-one",
            "talk": None,
        }  # fmt: skip
        assert +report.notes == {AMBIGUOUS: 1, NOT_AMONG: 2}

    def test_a_segment_without_a_text_is_unknown_and_not_empty(self, talk: Path) -> None:
        (talk.parent / "segments").write_text("a talk 0.5 1\nb talk 2.5 3\nc talk 4.5 5\n")
        (talk.parent / "text").write_text("a one\nc\nd four\ntalk all\n")
        cuts, report = prepared(talk, segment_seconds=2.0)
        assert texts_of(cuts) == ["one", None, ""]
        assert +report.notes == {WITHOUT_TEXT: 1, WITHOUT_UTTERANCE: 2}
        assert texts_of(prepared(talk)[0]) == [None]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("t talk 1", "line 1 is not: utterance recording start end [channel]"),
            ("t talk 1 2 A", "line 1 is not: utterance recording start end [channel]"),
            ("t talk 1 2 0 x", "line 1 is not: utterance recording start end [channel]"),
            ("t talk 1 2\nt talk 3 4", "line 2: the utterance t occurs twice"),
            ("t talk 2 1", "t lasts from 2 to 1 s"),
            ("t talk nan 1", "line 1 is not: utterance recording start end [channel]"),
            ("t talk 1 inf", "line 1 is not: utterance recording start end [channel]"),
            ("t talk -1 1", "t lasts from -1 to 1 s"),
        ],
    )
    def test_wrong_times_are_named(self, line: str, message: str, talk: Path) -> None:
        (talk.parent / "segments").write_text(f"{line}\n")
        (talk.parent / "text").write_text("t x\n")
        out = talk.parent.parent / "out"
        found = error_of("data", "prepare", "folder", talk.parent, out)
        assert found == f"{talk.parent / 'segments'}: {message}"

    def test_times_after_the_audio_are_named(self, talk: Path) -> None:
        write_audio(talk.with_name("good.wav"), noise(1.0))
        (talk.parent / "segments").write_text("t talk 8 9\n")
        (talk.parent / "text").write_text("t x\n")
        _, report = prepared(talk)
        assert [one[:3] for one in report.unusable] == [
            ("talk.wav", "transcript", "segments: has words at 8.0 s, but the audio ends at 6.0 s")
        ]


class TestChannels:
    """A telephone call: a speaker in each channel."""

    CTM = "call A 0.2 0.5 HELLO\ncall B 0.8 0.5 WORLD\ncall A 2.5 0.5 BYE\n"
    SEGMENTS = "a1 call 0.2 0.7 0\nb1 call 0.8 1.3 1\na2 call 2.5 -1 0\n"
    TEXT = "a1 HELLO\nb1 WORLD\na2 BYE\n"

    @pytest.fixture(params=["ctm", "segments"])
    def call(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        audio = np.stack([noise(4.0, seed=1), noise(4.0, seed=2)], axis=1)
        call = write_audio(tmp_path / "audio" / "call.wav", audio)
        if request.param == "ctm":
            call.with_suffix(".ctm").write_text(self.CTM)
        else:
            (call.parent / "segments").write_text(self.SEGMENTS)
            (call.parent / "text").write_text(self.TEXT)
        return call

    @pytest.mark.parametrize(
        ("channel", "texts", "notes"),
        [
            (0, ["HELLO", "BYE"], {}),
            (1, ["WORLD", ""], {}),
            (None, ["HELLO WORLD", "BYE"], {MIXED_CHANNELS: 1}),
        ],
    )
    def test_the_words_are_those_of_the_channel(
        self, channel: int | None, texts: list[str], notes: dict[str, int], call: Path
    ) -> None:
        cuts, report = prepared(call, options=Options(channel=channel))
        assert texts_of(cuts) == [" ".join(filter(None, texts))] and +report.notes == notes
        cuts, report = prepared(call, segment_seconds=2.0, options=Options(channel=channel))
        assert texts_of(cuts) == texts and +report.notes == notes

    def test_a_file_of_one_channel_has_all_words_of_its_transcript(self, talk: Path) -> None:
        talk.with_suffix(".ctm").write_text("talk B 0.2 0.5 HELLO\n")
        cuts, report = prepared(talk, options=Options(channel=0))
        assert texts_of(cuts) == ["HELLO"] and +report.notes == {}
        talk.with_suffix(".ctm").write_text("talk B 0.2 0.5 HELLO\ntalk A 1 1 WORLD\n")
        cuts, report = prepared(talk, options=Options(channel=0))
        assert texts_of(cuts) == ["HELLO WORLD"] and +report.notes == {MIXED_CHANNELS: 1}

    def test_a_channel_without_words_has_unknown_text(self, call: Path) -> None:
        (call.parent / "segments").unlink(missing_ok=True)
        call.with_suffix(".ctm").write_text("call 1 0.2 0.5 HELLO\ncall 1 3 0.5 WORLD\n")
        for options in ({}, {"segment_seconds": 2.0}):
            cuts, report = prepared(call, options=Options(channel=1), **options)
            assert {*texts_of(cuts)} == {None} and +report.notes == {OTHER_CHANNELS: 1}


def test_segments_and_recordings_of_the_same_name_have_different_ids(talk: Path) -> None:
    for name in ("talk-1.wav", "talk-01.wav", "talk/2.flac"):
        write_audio(talk.parent / name, noise(1.0))
    cuts, report = prepared(talk, segment_seconds=2.0)
    assert sorted(cut.id for cut in cuts) == ["talk-0", "talk-01", "talk-1", "talk-1.wav", "talk-2", "talk-2.flac"]
    assert report.notes[SAME_NAME] == 2
    cuts, report = prepared(talk)
    assert sorted(cut.id for cut in cuts) == ["talk", "talk-01", "talk-1", "talk-2"]
    assert +report.notes == {}


@pytest.fixture(scope="module")
def utterances(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of eight utterances, filled up with silence to 1.25 s, and their transcripts beside them."""
    folder = tmp_path_factory.mktemp("spoken") / "audio"
    texts = some_texts(8)
    for number, text in enumerate(texts):
        audio = np.zeros(RATE * 5 // 4, np.float32)
        audio[RATE // 10 : (len(text) + 1) * RATE // 10] = spoken(text, seed=number)
        write_audio(folder / f"u{number:02d}.flac", audio).with_suffix(".txt").write_text(text)
    return folder, texts


@pytest.mark.slow
def test_the_error_rate_of_a_segmented_recording_is_that_of_its_utterances(
    utterances: tuple[Path, list[str]], tmp_path: Path
) -> None:
    pytest.importorskip("jiwer", reason="jiwer is not installed: pip install 'w2vscale[decode]'")
    folder, texts = utterances
    training = prepare_folder(folder, tmp_path / "training").manifests[0].path
    build_index(training)
    settings = [
        *SPELLING, f"data.train={training}", "trainer.updates=220", "optim.lr=6e-3", "schedule.warmup_updates=10",
        "batch.max_seconds=30", "batch.micro_batches=1", "logging.every=50", "regularization.feature_grad_mult=1",
        "model.norm_first=true", "model.embedding_norm=false", "regularization.layerdrop=0", "regularization.dropout=0",
        "regularization.attention_dropout=0", "regularization.input_dropout=0", "objective.mask_probability=0.001",
    ]  # fmt: skip
    assert train(load_config("base", settings), tmp_path / "exp") == 0

    def score(manifest: Path) -> dict[str, Any]:
        output = tmp_path / "score.json"
        arguments = ("evaluate", tmp_path / "exp", "--wer", "--cuts", manifest, "-o", output)
        app(args=[str(argument) for argument in arguments], standalone_mode=False)
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    # Errors, so that there is something to compare: the words of four transcripts change places.
    texts = [" ".join(text.split()[::-1]) if number % 3 == 0 else text for number, text in enumerate(texts)]
    shutil.copytree(folder, tmp_path / "utterances")
    for number, text in enumerate(texts):
        (tmp_path / "utterances" / f"u{number:02d}.txt").write_text(text)
    expected = score(prepare_folder(tmp_path / "utterances", tmp_path / "separate").manifests[0].path)
    assert expected["words"]["reference"] == 16
    print(expected["words"], expected["wer"], expected["cer"])
    assert 0.0 < expected["wer"] < 0.7
    whole = np.concatenate([soundfile.read(file, dtype="float32")[0] for file in sorted(folder.glob("*.flac"))])
    words = []
    for number, text in enumerate(texts):
        at = 1.25 * number + 0.1
        for word in text.split():
            words.append(Timed(at, at + len(word) / 10, word))
            at += len(word) / 10 + 0.1
    phrases = [
        Timed(one.start, other.end, f"{one.text} {other.text}")
        for one, other in zip(words[::2], words[1::2], strict=True)
    ]
    for suffix in FORMATS:
        talk = write_audio(tmp_path / suffix / "audio" / "talk.flac", whole)
        units = phrases if suffix in (".srt", ".vtt") else words
        talk.with_suffix(suffix).write_text(FORMATS[suffix](units))
        cuts, report = prepared(talk, segment_seconds=1.25)
        assert [cut.start for cut in cuts] == [1.25 * number for number in range(8)]
        assert texts_of(cuts) == texts and +report.notes == {}
        found = score(report.manifests[0].path)
        for name in ("words", "characters", "wer", "cer"):
            assert found[name] == expected[name]
        hypotheses = [{one["hypothesis"] for one in result["utterances"]} for result in (found, expected)]
        assert hypotheses[0] == hypotheses[1]
