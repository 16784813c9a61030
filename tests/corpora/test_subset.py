"""Parts of a manifest: how much, whose, and that one seed's smaller part is in its larger one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from lhotse import CutSet, SupervisionSegment
from typer.testing import CliRunner

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from w2vscale.cli.app import app
from w2vscale.corpora.index import build_index
from w2vscale.corpora.subset import write_subset
from w2vscale.data.manifest import Manifest
from w2vscale.errors import UserError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 s of one speaker and 12 s of two others, in utterances of a second."""
    folder = tmp_path_factory.mktemp("subset")
    audio = write_audio(folder / "audio.flac", noise(1.0))
    cuts = []
    for speaker, count in (("ann", 36), ("bob", 12), ("cid", 12)):
        for number in range(count):
            cut = cut_of(audio, identifier=f"{speaker}-{number:02d}")
            cut.id = cut.recording_id
            cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0.0, cut.duration, speaker=speaker)]
            cuts.append(cut)
    return write_manifest(folder / "cuts.jsonl", cuts)


def names(path: Path) -> list[str]:
    return [cut.id for cut in CutSet.from_jsonl(path)]


def speakers(path: Path) -> Counter[str]:
    return Counter(name.partition("-")[0] for name in names(path))


def test_so_many_hours_in_the_manifests_order(manifest: Path, tmp_path: Path) -> None:
    written = write_subset(manifest, tmp_path / "a.jsonl", hours=20 / 3600)
    found = names(tmp_path / "a.jsonl")
    assert written.utterances == len(found) == 20
    assert written.hours == pytest.approx(20 / 3600)
    assert found == sorted(found)
    assert speakers(tmp_path / "a.jsonl")["ann"] > 6


def test_a_transcript_may_hold_any_ends_of_lines(manifest: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.jsonl"
    cuts = [*CutSet.from_jsonl(manifest)][:4]
    cuts[1].supervisions[0].text = "one\u2028two\x85three"
    lines = [json.dumps(cut.to_dict(), ensure_ascii=False) for cut in cuts]
    odd.write_text("\n".join(lines) + "\n", encoding="utf-8")
    build_index(odd)
    assert write_subset(odd, tmp_path / "all.jsonl", hours=4 / 3600).utterances == 4
    assert (tmp_path / "all.jsonl").read_bytes() == odd.read_bytes()


def test_speakers_get_equal_time_as_long_as_they_have_it(manifest: Path, tmp_path: Path) -> None:
    write_subset(manifest, tmp_path / "a.jsonl", hours=21 / 3600, balanced=True)
    assert speakers(tmp_path / "a.jsonl") == {"ann": 7, "bob": 7, "cid": 7}
    write_subset(manifest, tmp_path / "b.jsonl", hours=40 / 3600, balanced=True)
    assert speakers(tmp_path / "b.jsonl") == {"ann": 16, "bob": 12, "cid": 12}


@pytest.mark.parametrize("balanced", [False, True])
def test_a_seed_draws_the_same_and_its_parts_are_nested(manifest: Path, tmp_path: Path, balanced: bool) -> None:
    def draw(seconds: int, seed: int) -> set[str]:
        write_subset(manifest, tmp_path / "c.jsonl", hours=seconds / 3600, balanced=balanced, seed=seed)
        return set(names(tmp_path / "c.jsonl"))

    assert draw(10, 0) < draw(20, 0) == draw(20, 0) != draw(20, 1)


def test_utterances_by_name(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("cid-03\nann-07\n")
    result = CliRunner().invoke(
        app, ["data", "subset", str(manifest), str(tmp_path / "d.jsonl"), "--ids", str(tmp_path / "ids")]
    )
    assert result.exit_code == 0, result.output
    assert names(tmp_path / "d.jsonl") == ["ann-07", "cid-03"]
    assert len(Manifest(tmp_path / "d.jsonl")) == 2


def test_what_cannot_be_taken_is_named(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.jsonl"
    with pytest.raises(UserError, match=r"has 0\.02 hours, fewer than --hours 1"):
        write_subset(manifest, out, hours=1)
    (tmp_path / "ids").write_text("ann-07\nzoe-01\n")
    with pytest.raises(UserError, match=r"utterance zoe-01 is not in .*cuts\.jsonl"):
        write_subset(manifest, out, identifiers=tmp_path / "ids")
    with pytest.raises(UserError, match="none: cannot be read: No such file"):
        write_subset(manifest, out, identifiers=tmp_path / "none")
    assert not out.exists()
    for arguments, message in (
        ([str(manifest), str(out)], "no subset given"),
        ([str(manifest), str(manifest), "--hours", "1"], "the output is the manifest itself"),
    ):
        result = CliRunner().invoke(app, ["data", "subset", *arguments])
        assert isinstance(result.exception, UserError) and message in str(result.exception)


def test_ids_are_whole_lines(tmp_path: Path) -> None:
    audio = write_audio(tmp_path / "audio.flac", noise(1.0))
    given = ["take 1", "take 2 ", "naïve'\"x", "a-b"]
    cuts = [cut_of(audio, identifier=name).with_id(name) for name in given]
    manifest = write_manifest(tmp_path / "cuts.jsonl", cuts)
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "ids.txt").write_bytes("take 2\r\n\r\nnaïve'\"x\r\ntake 1\r\n".encode(encoding))
        write_subset(manifest, tmp_path / "out.jsonl", identifiers=tmp_path / "ids.txt")
        assert names(tmp_path / "out.jsonl") == given[:3]
    (tmp_path / "ids.txt").write_text("take\n")
    with pytest.raises(UserError, match="utterance take is not in"):
        write_subset(manifest, tmp_path / "out.jsonl", identifiers=tmp_path / "ids.txt")
