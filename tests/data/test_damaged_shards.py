"""Damaged shards are named and cost only their utterances, before they are indexed and after."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from tests.helpers.micro import MICRO_RUN
from tests.helpers.shards import (
    MANIFEST_DAMAGE,
    break_archive,
    config_with,
    cut_from,
    rewrite,
    stream_of,
)
from w2vscale.config import load_config
from w2vscale.corpora.shard_index import bad_shards_path, index_shards
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.shard_index import ShardCorpus, open_shard_index, write_shard_index
from w2vscale.errors import UserError
from w2vscale.training.train import train


class TestDamagedBeforeIndexing:
    """A damaged shard is named, and costs only its utterances."""

    def bad(self, folder: Path) -> list[BadAudio]:
        """The utterances that are left out of the index, and listed."""
        for _ in range(2):
            found = index_shards(folder)
            lines = bad_shards_path(folder).read_text().splitlines()
            assert [BadAudio(**json.loads(line)) for line in lines] == found.bad
        corpus = ShardCorpus([folder])
        assert corpus.not_found == len(found.bad)
        left = {cut_from(one).id for one in corpus.read(np.arange(len(corpus)))}
        assert len(left) == len(corpus) and not left & {bad.utterance for bad in found.bad}
        assert all(bad.left_out and "\n" not in bad.reason for bad in found.bad)
        return found.bad

    def test_an_archive_cut_short(self, three: Path) -> None:
        archive = break_archive(three)
        lost = self.bad(three)
        assert 3 < len(lost) < 14
        assert {bad.file for bad in lost} == {str(archive)}
        assert all(bad.reason.startswith("its shard cannot be read: ") for bad in lost)
        assert len(ShardCorpus([three])) == 40 - len(lost)

    def test_an_archive_cut_between_two_utterances(self, three: Path) -> None:
        _, places = open_shard_index(three)
        archive = three / "recording.000001.tar"
        archive.write_bytes(archive.read_bytes()[: int(places["offset"][14 + 5])])
        lost = self.bad(three)
        assert len(lost) == 14 - 5
        assert {bad.reason for bad in lost} == {"its shard cannot be read: the archive ends early"}

    @pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
    def test_a_manifest(self, three: Path, damage: str) -> None:
        path = three / "cuts.000000.jsonl.gz"
        path.write_bytes(MANIFEST_DAMAGE[damage](path.read_bytes()))
        assert {bad.file for bad in self.bad(three)} == {str(path)}

    def test_an_utterance_without_audio(self, three: Path) -> None:
        rewrite(three / "recording.000000.tar", lambda place, name: None if place in (6, 7) else name)
        (lost,) = self.bad(three)
        assert (lost.kind, lost.reason) == ("missing", "its shard has no audio of it")
        assert len(ShardCorpus([three])) == 39

    def test_an_utterance_that_is_marked_as_empty(self, three: Path) -> None:
        suffixes = {6: ".nodata", 7: ".nometa"}
        rewrite(
            three / "recording.000000.tar",
            lambda place, name: name.rpartition(".")[0] + suffixes[place] if place in suffixes else name,
        )
        (lost,) = self.bad(three)
        assert lost.reason == "its shard has no audio of it"

    def test_a_member_that_would_fill_the_memory(self, three: Path) -> None:
        first = CutSet.from_jsonl(three / "cuts.000001.jsonl.gz")[0].id
        header, description = tarfile.TarInfo(f"{first}.flac"), tarfile.TarInfo(f"{first}.json")
        header.size = 10**12
        with (three / "recording.000001.tar").open("wb") as archive:
            archive.write(header.tobuf())
            archive.seek(10**12, io.SEEK_CUR)  # a file with a hole
            archive.write(description.tobuf() + bytes(1024))
        lost = self.bad(three)
        assert len(lost) == 14
        (reason,) = {bad.reason for bad in lost if bad.utterance == first}
        assert "1,000,000,000,000 bytes; at most" in reason

    def test_an_archive_that_leads_back_to_itself(self, three: Path) -> None:
        archive = three / "recording.000001.tar"
        content = bytearray(archive.read_bytes())
        content[124:136] = b"\xff" * 11 + b"\x00"  # a size of minus 256 bytes
        content[148:156] = b"%06o\0 " % (256 + sum(content[:148]) + sum(content[156:512]))
        archive.write_bytes(content)
        assert len(self.bad(three)) == 14

    @pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
    def test_a_compressed_archive_is_refused(self, three: Path, compress: Callable[[bytes], bytes]) -> None:
        archive = three / "recording.000001.tar"
        archive.write_bytes(compress(archive.read_bytes()))
        with pytest.raises(
            UserError, match=rf"^{archive}: compressed \(.*\), so utterances cannot be found in it; deco"
        ):
            index_shards(three)

    def test_all_of_them_is_an_error_that_names_one(self, three: Path) -> None:
        for archive in three.glob("*.tar"):
            archive.write_bytes(b"")
        with pytest.raises(
            UserError, match=r"no utterance can be found in its shards; the first: .*recording.000000.tar"
        ):
            index_shards(three)
        for path in three.glob("cuts.*"):
            path.write_bytes(b"")
        with pytest.raises(UserError, match=r"no utterance can be found in its shards"):
            index_shards(three)


class TestDamagedAfterIndexing:
    """Files that still have their sizes: lost utterances are reported, and all others are as planned."""

    def lost(self, folder: Path) -> list[BadAudio]:
        source = stream_of([folder], config_with("data.min_seconds=0.5"))
        size = source.plan.lanes * source.series_length
        windows = source.windows(range(8), micro_batches=size, rank=0, world_size=1)
        batches = [batch for window in windows for batch in window]
        for batch in batches:
            assert batch.utterances + sum(bad.left_out for bad in batch.bad) == len(
                source.plan.micro_batch(batch.number).utterances
            )
        return list({bad.utterance: bad for batch in batches for bad in batch.bad}.values())

    def test_an_archive(self, three: Path) -> None:
        archive = three / "recording.000001.tar"
        content = archive.read_bytes()
        archive.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
        in_shard = {cut.id for cut in CutSet.from_jsonl(three / "cuts.000001.jsonl.gz")}
        lost = self.lost(three)
        assert {bad.utterance for bad in lost} < in_shard and len(lost) > 3
        assert {bad.left_out for bad in lost} == {True}
        assert all("\n" not in bad.reason for bad in lost)
        assert sum(bad.file == str(archive) for bad in lost) >= len(lost) - 1  # one may end in its audio

    def test_utterances_in_another_order(self, three: Path) -> None:
        places = open_shard_index(three)[1][14:28]
        archive = three / "recording.000001.tar"
        content = archive.read_bytes()
        one, other = (slice(int(p["offset"]), int(p["offset"] + p["size"])) for p in places[[2, 3]])
        archive.write_bytes(
            content[: one.start]
            + content[other]
            + content[one.stop : other.start]
            + content[one]
            + content[other.stop :]
        )
        assert archive.stat().st_size == len(content)
        lost = self.lost(three)
        assert len(lost) == 2 and all(bad.file == str(archive) for bad in lost)

    def test_a_manifest(self, three: Path) -> None:
        path = three / "cuts.000000.jsonl.gz"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
        lost = self.lost(three)
        assert {bad.file for bad in lost} == {str(path)}

    def test_a_manifest_of_other_cuts(self, three: Path) -> None:
        path = three / "cuts.000000.jsonl.gz"
        lines = gzip.decompress(path.read_bytes()).splitlines()
        lines[4] = lines[5]
        path.write_bytes(gzip.compress(b"\n".join(lines)))
        records, places = open_shard_index(three)
        described = np.array(records)
        described["cuts_bytes"][0] = path.stat().st_size
        write_shard_index(three, described, np.array(places))
        (lost,) = self.lost(three)
        assert (lost.utterance, lost.kind, lost.file) == ("line 5", "not a cut", str(path))
        assert "unlike when it was indexed" in lost.reason

    def test_files_that_are_gone(self, three: Path) -> None:
        source = stream_of([three], config_with("data.min_seconds=0.5"))
        (three / "recording.000001.tar").unlink()
        (three / "cuts.000002.jsonl.gz").unlink()
        size = source.plan.lanes * source.series_length
        bad = {
            one
            for window in source.windows(range(8), micro_batches=size, rank=0, world_size=1)
            for batch in window
            for one in batch.bad
        }
        assert len({one.utterance for one in bad if one.file.endswith("recording.000001.tar")}) == 14
        assert any(one.file.endswith("cuts.000002.jsonl.gz") for one in bad)
        assert all("No such file" in one.reason for one in bad)

    def test_all_of_them_is_an_error_that_names_one(self, three: Path) -> None:
        for archive in three.glob("*.tar"):
            archive.write_bytes(bytes(archive.stat().st_size))
        with pytest.raises(
            UserError, match=r"none of 8 sampled utterances can be read; the first: .*recording.00000\d.tar"
        ):
            self.lost(three)


def test_a_run_says_what_is_left_out(three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_archive(three)
    lost = len(index_shards(three).bad)
    settings = [*MICRO_RUN, "data.mode=stream", f"data.train={three}", "data.min_seconds=0.75", "trainer.updates=4"]
    assert train(load_config("base", settings), tmp_path / "exp") == 0
    printed = capsys.readouterr().out
    assert re.search(rf"left out \d of {40 - lost} utterances: shorter than data.min_seconds", printed)
    assert f"left out {lost} utterances of damaged shards: see shards.bad_audio.jsonl beside them" in printed
    assert "stream: the loader processes of all ranks hold 4 blocks of up to 1000 utterances" in printed
