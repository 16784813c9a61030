"""What is found below a folder: audio by suffix, transcripts, links, and all the rest by number and reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2vscale.corpora.finding import AudioFile, find_audio
from w2vscale.data.decoding import is_audio
from w2vscale.errors import UserError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def paths_in(folder: Path) -> list[str]:
    return [file.path for file in find_audio(folder).audio]


def test_paths_are_sorted_by_their_parts(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("b/1.wav", "b.wav", "a/z.flac", "a/b/c.opus", "B.WAV", "b-/1.mp3")))
    assert paths_in(tmp_path) == ["B.WAV", "a/b/c.opus", "a/z.flac", "b/1.wav", "b-/1.mp3", "b.wav"]


def test_names_of_every_kind(tmp_path: Path) -> None:
    names = ["with space.wav", 'quote\'s "x".wav', "new\nline.wav", "naïve ☃.wav", "case.wav", "Case.wav", "-o.wav"]
    touch(*(tmp_path / name for name in names))
    assert sorted(paths_in(tmp_path)) == sorted(names)


def test_everything_else_is_counted(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.wav", "notes.pdf", "b/notes.PDF", "README", "._a.wav", ".git/x.wav")))
    os.mkfifo(tmp_path / "pipe.wav")
    os.symlink(tmp_path / "absent.wav", tmp_path / "broken.wav")
    found = find_audio(tmp_path)
    assert found.audio == [AudioFile("a.wav")]
    assert found.others == {
        (".pdf", "not audio"): 2,
        ("(no suffix)", "not audio"): 1,
        (".wav", "hidden"): 1,
        ("(no suffix)", "hidden"): 1,
        (".wav", "not a file"): 1,
        (".wav", "broken link"): 1,
    }


def test_transcripts_with_times_are_preferred(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.wav", "a.TXT", "b.flac", "b.txt", "b.TextGrid", "c.mp3", "d.txt")))
    found = find_audio(tmp_path)
    assert found.audio == [AudioFile("a.wav", [".TXT"]), AudioFile("b.flac", [".TextGrid"]), AudioFile("c.mp3")]
    unused = "no audio file beside it has its name"
    assert found.others == {
        (".txt", "another transcript of the audio file is used"): 1,
        (".txt", unused): 1,
    }


def test_a_text_beside_json_is_kept_in_case_that_this_is_something_else(tmp_path: Path) -> None:
    touch(
        *(
            tmp_path / name
            for name in ("a.wav", "a.json", "a.txt", "a.TXT", "b.wav", "b.JSON", "c.wav", "c.vtt", "c.json")
        )
    )
    found = find_audio(tmp_path)
    assert found.audio == [
        AudioFile("a.wav", [".json", ".TXT"]), AudioFile("b.wav", [".JSON"]), AudioFile("c.wav", [".vtt"])
    ]  # fmt: skip
    preferred = "another transcript of the audio file is used"
    assert found.others == {(".txt", preferred): 1, (".json", preferred): 1}


def test_a_transcript_may_be_beside_a_link(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other.wav"
    touch(corpus / "all" / "1.wav", corpus / "all" / "2.wav", corpus / "all" / "2.txt", other)
    for link, target in {
        "named/hello.wav": "../all/1.wav", "named/two.wav": "../all/2.wav", "x/a.wav": other, "x/b.wav": other
    }.items():  # fmt: skip
        (corpus / link).parent.mkdir(exist_ok=True)
        os.symlink(target, corpus / link)
        if not link.endswith("a.wav"):
            touch((corpus / link).with_suffix(".txt"))
    found = find_audio(corpus)
    assert [(file.path, file.transcripts) for file in found.audio] == [
        ("all/1.wav", ["named/hello.txt"]), ("all/2.wav", ["all/2.txt"]), ("x/a.wav", ["x/b.txt"])
    ]  # fmt: skip
    assert found.others == {
        (".wav", "link to a file that is used anyway"): 3,
        (".txt", "another transcript of the audio file is used"): 1,
    }


def test_links_are_followed_once(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    touch(corpus / "speaker" / "a.wav", other / "b.wav", other / "blob")
    os.symlink(corpus, corpus / "loop")
    os.symlink(corpus / "speaker", corpus / "again")
    os.symlink(other, corpus / "linked")
    os.symlink(other, corpus / "linked-too")
    os.symlink(other / "b.wav", corpus / "b-too.wav")
    os.symlink("../speaker/a.wav", corpus / "speaker" / "same.wav")
    os.symlink(other / "blob", corpus / "named.wav")  # as in the cache of Hugging Face
    os.symlink(other / "blob", corpus / "named-too.wav")
    os.symlink("self", corpus / "self")
    found = find_audio(corpus)
    assert [file.path for file in found.audio] == ["linked/b.wav", "named-too.wav", "speaker/a.wav"]
    anyway = "link to a {} that is used anyway"
    assert found.others[("(no suffix)", anyway.format("folder"))] == 3
    assert found.others[(".wav", anyway.format("file"))] == 3
    assert found.others[("(no suffix)", "broken link")] == 1


NAMES = ["a.wav", "A.WAV", "b.flac", "a.txt", "a.TXT", "a.json", "b.srt", "notes.pdf", "README", "._a.wav", ".x"]


@settings(max_examples=100)
@given(
    files=st.sets(st.tuples(st.sampled_from(["", "d/", "d/e/", "f/", ".git/"]), st.sampled_from(NAMES)), min_size=1),
    links=st.dictionaries(
        st.sampled_from(["l", "d/l", "l.wav", "d/l.flac", "f/l.txt", ".l", "f/m"]),
        st.sampled_from(["", "d", "d/e", "f", "a.wav", "d/a.wav", "f/b.flac", "notes.pdf", "no", "l", "d/a.txt"]),
    ),
)
def test_every_entry_is_found_or_counted(
    files: set[tuple[str, str]], links: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    top = tmp_path_factory.mktemp("tree")
    touch(*(top / place / name for place, name in files))
    for link, target in links.items():
        (top / link).parent.mkdir(exist_ok=True)
        os.symlink(top / target, top / link)
    entries = 0
    for place, folders, names in os.walk(top):
        hidden = [name for name in folders if name.startswith(".")]
        linked = [name for name in folders if os.path.islink(os.path.join(place, name)) and name not in hidden]
        entries += len(names) + len(hidden) + len(linked)
        folders[:] = [name for name in folders if name not in hidden]
    found = find_audio(top)
    assert not found.unusable
    assert len(found.audio) + sum(len(file.suffixes) for file in found.audio) + found.others.total() == entries
    reals = [os.path.realpath(top / file.path) for file in found.audio]
    assert len({*reals}) == len(reals)
    assert {*reals} >= {
        str(top / place / name) for place, name in files if is_audio(name) and "/." not in f"/{place}{name}"
    }
    for file in found.audio:
        for transcript in file.transcripts:
            assert (top / transcript).is_file()


def test_an_unreadable_folder_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    touch(tmp_path / "a.wav", tmp_path / ("x" * 200) / "b.wav")
    deep = tmp_path / "deep"
    deep.mkdir()
    here = os.getcwd()
    try:  # a path that is too long for the system, whoever the user is
        os.chdir(deep)
        for _ in range(25):
            os.mkdir("y" * 200)
            os.chdir("y" * 200)
        found = find_audio(tmp_path)
    finally:
        os.chdir(here)
    assert [file.path for file in found.audio] == ["a.wav", "x" * 200 + "/b.wav"]
    assert [(one.kind, one.reason) for one in found.unusable] == [("unreadable", "cannot be read: File name too long")]


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file or directory"):
        find_audio(tmp_path / "no")
