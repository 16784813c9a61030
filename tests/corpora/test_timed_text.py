"""Transcripts with times in every form: what is read, and what is named."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2vscale.corpora.folder_texts import Transcript
from w2vscale.corpora.segments import Timed
from w2vscale.corpora.timed_text import OTHER_NAME, OTHER_RECORDINGS, OTHER_WORDS, ROLLED, read_timed
from w2vscale.errors import UserError

WORDS = [Timed(0.5, 0.9, "GOOD"), Timed(1.0, 1.5, "DAY"), Timed(2.25, 3.0, "TÖNE")]

CTM = """;; made by an aligner
talk 1 1.00 0.50 DAY 0.98
talk 1 0.5 0.4 GOOD
talk 1 1.5 .75 <eps>

talk A 2.25 .75 TÖNE
"""
LONG_TEXT_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 3.5
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 3.5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 3.5
            text = "g 1 ""x"" [7]"
    item [2]:
        class = "TextTier"
        name = "notes"
        xmin = 0
        xmax = 3.5
        points: size = 1
        points [1]:
            number = 1.5
            mark = "a 9"
    item [3]:
        class = "IntervalTier"
        name = "anna - words"
        xmin = 0
        xmax = 3.5
        intervals: size = 5
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = 0.9
            text = "GOOD"
        intervals [3]:
            xmin = 1.0
            xmax = 1.5
            text = "DAY"
        intervals [4]:
            xmin = 1.5
            xmax = 2.25
            text = "sp"
        intervals [5]:
            xmin = 2.25
            xmax = 3
            text = "TÖNE"
"""
SHORT_TEXT_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
3.5
<exists>
1
"IntervalTier"
"transcript"
0
3.5
3
0.5
0.9
"GOOD"
1
1.5
"DAY"
2.25
3
"TÖNE"
"""
SRT = """1
00:00:00,500 --> 00:00:00,900
<i>GOOD</i>

2
00:00:01,000 --> 00:00:01,500 X1:40 X2:600
{\\an8}DAY

3
00:00:02,250 --> 00:00:03,000
TÖNE
"""
VTT = """WEBVTT - some title

NOTE a remark, 00:00 is not a cue

00:00.500 --> 00:00.900 align:start
<v Anna>GOOD</v>

two
00:00:01.000 --> 00:00:01.500
DAY

00:02.250 --> 00:03.000
T&Ouml;NE
"""
WHISPER = {
    "text": "GOOD DAY TÖNE",
    "segments": [
        {
            "start": 0.5,
            "end": 1.5,
            "text": "GOOD DAY",
            "words": [
                {"word": " GOOD", "start": 0.5, "end": 0.9},
                {"word": " DAY", "start": 1.0, "end": 1.5, "probability": 0.9},
            ],
        },
        {"start": 2.25, "end": 3.0, "text": " TÖNE"},
    ],
}
WORD_LIST = [
    {"text": "GOOD", "start_time": 0.5, "duration": 0.4},
    {"word": "DAY", "start": 1.0, "end": 1.5},
    {"word": "TÖNE", "start": 2.25, "end": 3},
]
FORMS = {
    "talk.ctm": CTM,
    "talk.TextGrid": LONG_TEXT_GRID,
    "short.TextGrid": SHORT_TEXT_GRID,
    "talk.srt": SRT,
    "talk.vtt": VTT,
    "talk.json": json.dumps(WHISPER),
    "list.json": json.dumps({"words": WORD_LIST}),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_words_and_times(name: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FORMS[name].replace("\n", "\r\n" if encoding == "utf-16" else "\n").encode(encoding))
    found = read_timed(path)
    assert found is not None and [unit.text for unit in found] == [word.text for word in WORDS]
    assert [unit[:2] for unit in found] == [pytest.approx(word[:2]) for word in WORDS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("talk.ctm", "talk 1 0.5\n", "line 1 is not: recording channel start duration word"),
        ("talk.ctm", "a 1 0.5 1 X\nb 1 0.5 1 X\n", "has the recordings a, b, but not talk"),
        ("talk.ctm", "talk 1 0.5 -1 X\n", "'X' lasts from 0.5 to -0.5 s"),
        ("talk.ctm", "talk 1 0 1 X 0.9\ntalk 1 1 1 GOOD DAY\n", "line 2 is not: recording channel start duration word"),
        (
            "talk.TextGrid",
            'File type = "ooTextFile"\nObject class = "TextGrid"\n0\n',
            "not a TextGrid transcript: it ends early",
        ),
        ("talk.TextGrid", SHORT_TEXT_GRID[:-12], "it ends early"),
        ("talk.TextGrid", "hello", "it ends early"),
        ("talk.TextGrid", '"a" "b" 0 1', "it does not begin as a TextGrid of Praat"),
        (
            "talk.TextGrid",
            LONG_TEXT_GRID.replace("anna - words", "a").replace('"TextTier"', '"IntervalTier"'),
            "ends early",
        ),
        ("talk.srt", "just text\n", "line 1, 'just text', is in no cue"),
        ("talk.vtt", "just text\n", "line 1, 'just text', is in no cue: an empty line ends a cue"),
        ("talk.vtt", "1\n", "line 1, '1', is in no cue"),
        ("talk.vtt", VTT.replace("DAY", "DAY\n\nAND NIGHT"), "line 12, 'AND NIGHT', is in no cue"),
        ("talk.srt", SRT.replace("DAY", "IN\n\n1984"), "line 9, '1984', is in no cue"),
        ("talk.srt", SRT.replace("00:00:02,250", "00:00:62,250"), "'00:00:62,250 --> 00:00:03,000', is not like"),
        ("talk.srt", SRT.replace("DAY", "DAY\n\nAND NIGHT"), "line 9, 'AND NIGHT', is in no cue"),
        (
            "talk.srt",
            SRT.replace("00:00:02,250 -->", "00:00:02,250 ->"),
            "'00:00:02,250 -> 00:00:03,000', is in no cue",
        ),
        ("talk.json", "{", "not a json transcript"),
        ("talk.json", '[{"text": "a", "start": 0, "end": 1}, {"text": "b", "start": 2}]', "number 2 has no text or no"),
        ("talk.json", '{"words": [{"word": "a", "start": 0, "end": 1}, {"word": "b"}]}', "number 2 has no text or no"),
        ("talk.json", '{"segments": [{"text": "a", "start": 2, "end": 1}]}', "'a' lasts from 2 to 1 s"),
        (
            "talk.srt",
            "1\n00:00:01,000 --> 00:00:02,000\nA\n\n2\n0 --> 1\nB\n",
            "line 6, '0 --> 1', is not like 00:00:01,000 --> 00:00:02,500",
        ),
        ("talk.srt", "00:00:01 --> 00:00:02:12\nA\n", "line 1, '00:00:01 --> 00:00:02:12', is not like 00:00:01,000"),
        ("talk.vtt", "WEBVTT\n\n00:01 --> 00:02\nA --> B\n", "line 4, 'A --> B', must follow an empty line"),
        ("talk.vtt", "WEBVTT\n\n00:01 --> 00:02\nA\n00:02 --> 00:03\nB", "line 5, '00:02 --> 00:03', must follow"),
        ("talk.srt", "NOTE a --> b\n", "line 1, 'NOTE a --> b', is not like"),
    ],
)
def test_other_forms_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_timed(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.vtt", "WEBVTT\n\n"), ("a.srt", ""), ("a.ctm", ";; none\n")])
def test_a_transcript_in_which_nothing_is_said(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_timed(tmp_path / name) == []


@pytest.mark.parametrize(
    ("names", "channels"),
    [("A B", [0, 1]), ("1 2", [0, 1]), ("0 1", [0, 1]), ("b 2", [1, 1]), ("left _", ["left", "_"])],
)
def test_channels_of_a_ctm(names: str, channels: list[int | str], tmp_path: Path) -> None:
    lines = [f"talk {name} {second} 1 x\n" for second, name in enumerate(names.split())]
    (tmp_path / "talk.ctm").write_text("".join(lines))
    assert [unit.channel for unit in read_timed(tmp_path / "talk.ctm") or ()] == channels


@pytest.mark.parametrize("name", ["talk.srt", "talk.vtt"])
@pytest.mark.parametrize("end_of_line", ["\n", "\r\n", " \n"])
def test_cues_without_fractions_and_with_short_fields(name: str, end_of_line: str, tmp_path: Path) -> None:
    content = "1\n0:0:1 --> 00:00:02\nA\nB\n\n2\n0:02.5-->0:3,25 align:start\nC\n\n1:00:03 --> 1:00:04\n"
    (tmp_path / name).write_bytes(content.replace("\n", end_of_line).encode())
    assert read_timed(tmp_path / name) == [Timed(1.0, 2.0, "A B"), Timed(2.5, 3.25, "C"), Timed(3603.0, 3604.0, "")]


def test_notes_styles_and_regions_are_not_cues(tmp_path: Path) -> None:
    blocks = ["NOTE", "NOTE old:", "STYLE", "REGION\nid:a"]
    notes = "\n\n".join(f"{block}\n00:01.000 --> 00:02.000 is\nno cue" for block in blocks)
    (tmp_path / "talk.vtt").write_text(f"WEBVTT\n\n{notes}\n\nNOTES\n00:01.000 --> 00:02.000\nNOTE THIS\n\n{notes}\n")
    assert read_timed(tmp_path / "talk.vtt") == [Timed(1.0, 2.0, "NOTE THIS")]


YOUTUBE = """WEBVTT
Kind: captions
Language: en

00:00:00.160 --> 00:00:02.389 align:start position:0%
 
hello<00:00:00.480><c> and</c><00:00:00.880><c> welcome</c>

00:00:02.389 --> 00:00:02.399 align:start position:0%
hello and welcome
 

00:00:02.399 --> 00:00:04.500 align:start position:0%
hello and welcome
to<00:00:02.600><c> the</c><00:00:02.900><c> show</c>

00:00:04.500 --> 00:00:04.510 align:start position:0%
to the show
 

00:00:04.510 --> 00:00:06.000 align:start position:0%
to the show
to<00:00:04.700><c> the</c><00:00:05.000><c> show</c>

00:00:09.000 --> 00:00:10.000 align:start position:0%
to the show
it<00:00:09.500><c> goes</c>
"""


def test_rolling_captions_have_each_line_once(tmp_path: Path) -> None:
    (tmp_path / "talk.vtt").write_text(YOUTUBE)
    notes = Counter[str]()
    assert read_timed(tmp_path / "talk.vtt", notes=notes) == [
        Timed(0.16, 2.389, "hello and welcome"),
        Timed(2.399, 4.5, "to the show"),
        Timed(4.51, 6.0, "to the show"),
        Timed(9.0, 10.0, "to the show it goes"),  # after a pause: it is said again
    ]
    assert notes == {ROLLED: 4}


@pytest.mark.parametrize(
    ("cues", "texts", "rolled"),
    [
        ([(0, 1, "A\nB"), (1, 2, "B\nC"), (1.5, 3, "C\nD\nE"), (3, 4, "D\nE\nF")], ["A B", "C", "D E", "F"], 4),
        ([(0, 1, "NO"), (1, 2, "NO"), (2, 3, "NO\nYES")], ["NO", "NO", "YES"], 1),
        ([(0, 1, "A\nB"), (1.1, 2, "B\nC")], ["A B", "B C"], 0),
        ([(0, 1, "A\nB"), (1, 1.01, "A"), (1.01, 2, "A B")], ["A B", "A", "A B"], 0),
        ([(5, 6, "A"), (0, 1, "A\nB")], ["A B", "A"], 0),
        ([(0, 1, "A"), (1.001, 2, "A\nB")], ["A", "B"], 1),  # times are rounded
        ([(0, 1, ""), (1, 2, "")], ["", ""], 0),
    ],
)
def test_only_lines_that_touch_the_cue_before_are_dropped(
    cues: list[tuple[float, float, str]], texts: list[str], rolled: int, tmp_path: Path
) -> None:
    content = "\n\n".join(f"0:{start} --> 0:{end}\n{text}" for start, end, text in cues)
    (tmp_path / "talk.srt").write_text(content)
    notes = Counter[str]()
    found = read_timed(tmp_path / "talk.srt", notes=notes)
    assert found is not None and [unit.text for unit in found] == texts
    assert notes[ROLLED] == rolled


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("talk.json", '[{"word": "a", "start": 1%s, "end": 2}]' % ("0" * 400), "not a json transcript: int too large"),
        ("talk.srt", "9%s:00:00,0 --> 00:00:01,0\nx\n" % ("9" * 400), "not a srt transcript: int too large"),
        ("talk.TextGrid", SHORT_TEXT_GRID.replace("<exists>\n1\n", "<exists>\n1e999\n"), "not a TextGrid transcript"),
    ],
)
def test_absurd_numbers_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_timed(tmp_path / name)


@settings(max_examples=200)
@given(
    name=st.sampled_from([*FORMS]),
    start=st.integers(0, 3000),
    length=st.integers(0, 40),
    inserted=st.text(max_size=20)
    | st.sampled_from(
        ["null", "[]", '{"words": 3}', '"x"', "-1", "1e999", "NaN", "9" * 400, "-->", '"', "\n\n", "[" * 999]
    ),
)
def test_a_damaged_transcript_is_read_or_named_in_one_line(
    name: str, start: int, length: int, inserted: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / name
    start = min(start, len(FORMS[name]))
    text = FORMS[name][:start] + inserted + FORMS[name][start + length :]
    path.write_bytes(text.encode(errors="surrogatepass"))
    found, message = None, f"{path}: "
    try:
        found = read_timed(path)
    except UserError as error:
        message = str(error)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(0 <= unit.start <= unit.end and unit.start < math.inf for unit in found or ())


@pytest.mark.parametrize("words", ["one two", 3, ["one"], [{"word": "one"}], None])
def test_a_segment_whose_words_have_another_form_is_one_phrase(words: object, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(json.dumps([{"text": "one two", "start": 1, "end": 2, "words": words}]))
    assert read_timed(tmp_path / "talk.json") == [Timed(1.0, 2.0, "one two")]


@pytest.mark.parametrize(
    "document",
    [
        {"id": 3},
        [{"words": "one two"}],
        [1, 2],
        [],
        {"words": []},
        {"text": "", "segments": []},
        {"words": "none"},
        {"segments": [{"text": "no times"}]},
    ],
)
def test_json_without_words_is_no_transcript(document: object, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(json.dumps(document))
    assert read_timed(tmp_path / "talk.json") is None


def test_segments_are_read_if_the_list_of_words_is_empty(tmp_path: Path) -> None:
    segments = [{"start": 0.5, "end": 1, "text": "one"}]
    (tmp_path / "talk.json").write_text(json.dumps({"words": [], "segments": segments}))
    assert read_timed(tmp_path / "talk.json") == [Timed(0.5, 1.0, "one")]


def test_a_segment_with_a_word_without_times_is_one_phrase(tmp_path: Path) -> None:
    words = [{"word": "in", "start": 0.1, "end": 0.2}, {"word": "1999"}]
    (tmp_path / "talk.json").write_text(
        json.dumps({"segments": [{"start": 0, "end": 1, "text": "in 1999", "words": words}]})
    )
    assert read_timed(tmp_path / "talk.json") == [Timed(0.0, 1.0, "in 1999")]


def test_a_line_of_a_ctm_has_one_word_and_perhaps_more_about_it(tmp_path: Path) -> None:
    lines = "talk 1 0 1 10\u00a0000 0.99\ntalk\t1 1 1 b NA lex anna\n"
    (tmp_path / "talk.ctm").write_text(lines)
    assert [unit.text for unit in read_timed(tmp_path / "talk.ctm") or ()] == ["10\u00a0000", "b"]


def test_other_recordings_in_a_ctm_are_counted(tmp_path: Path) -> None:
    notes = Counter[str]()
    (tmp_path / "talk.ctm").write_text("other 1 0 1 x\n")
    assert [unit.text for unit in read_timed(tmp_path / "talk.ctm", notes=notes) or ()] == ["x"]
    assert +notes == {OTHER_NAME: 1}
    notes.clear()
    (tmp_path / "talk.ctm").write_text("other 1 0 1 x\ntalk 1 0 1 y\nother 1 1 1 z\n")
    assert [unit.text for unit in read_timed(tmp_path / "talk.ctm", notes=notes) or ()] == ["y"]
    assert +notes == {OTHER_RECORDINGS: 2}


def tier(name: str, *words: tuple[float, float, str]) -> str:
    intervals = "".join(f'{start}\n{end}\n"{text}"\n' for start, end, text in words)
    return f'"IntervalTier"\n"{name}"\n0\n9\n{len(words)}\n{intervals}'


def test_all_tiers_of_words_are_read_and_no_others(tmp_path: Path) -> None:
    tiers = [tier("words", (0, 1, "a")), tier("words", (3, 4, "b")), tier("keywords", (0, 1, "no")), tier("x - Word")]
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n9\n<exists>\n4\n'
    (tmp_path / "talk.TextGrid").write_text(head + "".join(tiers))
    assert read_timed(tmp_path / "talk.TextGrid") == [Timed(0.0, 1.0, "a"), Timed(3.0, 4.0, "b")]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("if a < b and c > d", "if a < b and c > d"),
        ("<i>5 < 6 and 7 > 3</i>", "5 < 6 and 7 > 3"),
        ("<v.loud Anna B.>a</v> <00:00:01.500><c>b</c> <font color='x'>c</font>", "a b c"),
        ("A&amp;T &copy that &#233;&#xE9;&Ouml; &notin", "A&T &copy that ééÖ &notin"),
    ],
)
def test_markup_is_left_out_and_nothing_else(line: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "talk.srt").write_text(f"1\n00:00:01,000 --> 00:00:02,000\n{line}\n")
    assert read_timed(tmp_path / "talk.srt") == [Timed(1.0, 2.0, text)]


def test_subtitles_that_do_not_roll_keep_what_is_said_twice(tmp_path: Path) -> None:
    cues = [(0, 1, "A"), (1, 2, "B"), (2, 3, "STOP"), (3, 4, "STOP\nOUT"), (4, 5, "C")]
    (tmp_path / "talk.srt").write_text("\n\n".join(f"0:{start} --> 0:{end}\n{text}" for start, end, text in cues))
    assert [unit.text for unit in read_timed(tmp_path / "talk.srt") or ()] == ["A", "B", "STOP", "STOP OUT", "C"]


def listed(*words: str) -> list[dict[str, object]]:
    return [{"word": word, "start": second, "end": second + 1} for second, word in enumerate(words)]


@pytest.mark.parametrize(
    ("text", "words", "whole"),
    [
        ("今日は晴れ", ["今日", "は", "晴れ"], "今日は晴れ"),
        (" Don't go, well-known.", [" Don", "'t", " go,", " well", "-known."], "Don't go, well-known."),
        ("“So,” he said. Well-known!", ["So", "he", "said", "Well", "known"], "“So,” he said. Well-known!"),
        (None, [" Don", "'t", " go"], "Don't go"),
        (None, ["do", "not", "go"], "do not go"),
        ("", ["do", "not"], "do not"),
    ],
)
@pytest.mark.parametrize("form", ["words", "segments", "list"])
def test_words_of_json_are_written_as_in_their_text(
    text: str | None, words: list[str], whole: str, form: str, tmp_path: Path
) -> None:
    segment = {"text": text, "words": listed(*words), "start": 0, "end": 9}
    forms = {"words": segment, "segments": {"segments": [segment]}, "list": [segment]}
    (tmp_path / "talk.json").write_text(json.dumps(forms[form]))
    notes = Counter[str]()
    found = read_timed(tmp_path / "talk.json", notes=notes)
    assert found is not None and len(found) == len(words) and not +notes
    assert Transcript(found).whole() == whole


def test_a_segment_with_other_words_than_its_text_is_one_phrase_and_counted(tmp_path: Path) -> None:
    for words in (["one"], ["two"], ["one", "four"]):
        segments = [{"text": " one two", "start": 0, "end": 2, "words": listed(*words)}]
        notes = Counter[str]()
        (tmp_path / "talk.json").write_text(json.dumps({"segments": segments}))
        assert read_timed(tmp_path / "talk.json", notes=notes) == [Timed(0.0, 2.0, "one two")]
        assert +notes == {OTHER_WORDS: 1}


def test_segments_are_read_if_the_words_are_not_all_known(tmp_path: Path) -> None:
    segments = [{"text": "one two", "start": 0, "end": 2}]
    for words in ([*listed("one"), {"word": "two"}], listed("one")):
        document = {"text": "one two", "words": words, "segments": segments}
        (tmp_path / "talk.json").write_text(json.dumps(document))
        assert read_timed(tmp_path / "talk.json") == [Timed(0.0, 2.0, "one two")]
    notes = Counter[str]()
    (tmp_path / "talk.json").write_text(json.dumps({"text": "one two", "words": listed("one")}))
    assert read_timed(tmp_path / "talk.json", notes=notes) == [Timed(0.0, 1.0, "one")]
    assert +notes == {OTHER_WORDS: 1}


def test_chunks_of_a_pipeline_of_transformers(tmp_path: Path) -> None:
    chunks = [{"text": " one", "timestamp": [0.0, 2.0]}, {"text": " two", "timestamp": [2.5, None]}]
    (tmp_path / "talk.json").write_text(json.dumps({"text": " one two", "chunks": chunks}))
    assert read_timed(tmp_path / "talk.json") == [Timed(0.0, 2.0, "one"), Timed(2.5, math.inf, "two")]
