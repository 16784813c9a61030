"""Shar shards: what is written, and the index beside them."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lhotse import CutSet

from tests.helpers.audio import cut_of, noise, tone, write_audio, write_manifest, write_text
from tests.helpers.shards import (
    audio_of,
    config_with,
    cut_from,
    cuts_of,
    stream_of,
)
from w2vscale.corpora import shard_index as corpora_shard_index
from w2vscale.corpora.parallel import Part
from w2vscale.corpora.shar import write_shards
from w2vscale.corpora.shard_index import IndexedShards, index_shards
from w2vscale.data.shard_index import ShardCorpus, open_shard_index, shard_index_path, write_shard_index
from w2vscale.data.shards import Shard
from w2vscale.errors import UserError


class TestShards:
    def test_every_utterance_is_in_one_with_its_audio(self, manifest: Path, shards: Path) -> None:
        found = {cut.id: cut for cut in cuts_of(shards)}
        assert len(cuts_of(shards)) == len(found) == 40
        assert len(list(shards.glob("cuts.*.jsonl.gz"))) == len(list(shards.glob("recording.*.tar"))) == 4
        for cut in CutSet.from_jsonl(manifest):
            assert np.array_equal(audio_of(found[cut.id]), audio_of(cut))

    def test_utterances_are_shuffled(self, shards: Path) -> None:
        order = [cut.id for cut in cuts_of(shards)]
        assert order != sorted(order)

    def test_jobs_change_nothing(self, manifest: Path, shards: Path, tmp_path: Path) -> None:
        write_shards(manifest, tmp_path, shard_size=10, jobs=2)
        for shard in shards.glob("recording.*.tar"):
            assert [cut.id for cut in cuts_of(tmp_path)] == [cut.id for cut in cuts_of(shards)]
            assert (tmp_path / shard.name).stat().st_size == shard.stat().st_size

    def test_bad_audio_is_left_out_and_reported_also_by_a_repeat(self, tmp_path: Path) -> None:
        paths = [write_audio(tmp_path / f"u{n}.flac", noise(2.0, seed=n)) for n in range(6)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
        write_text(paths[2])
        paths[4].unlink()
        for _ in range(2):
            written = write_shards(manifest, tmp_path / "shards", shard_size=4)
            assert (written.shards, written.utterances) == (2, 4)
            assert {(bad.utterance, bad.kind) for bad in written.bad} == {("u2", "undecodable"), ("u4", "missing")}
        assert sorted(cut.id for cut in cuts_of(tmp_path / "shards")) == ["u0", "u1", "u3", "u5"]

    @pytest.mark.parametrize("count", [2, 3, 7])
    def test_all_parts_together_are_the_whole(self, count: int, tmp_path: Path) -> None:
        paths = [write_audio(tmp_path / f"u{n}.flac", noise(0.5, seed=n)) for n in range(10)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
        for number in (1, 2, 7):
            paths[number].unlink()
        whole = write_shards(manifest, tmp_path / "whole", shard_size=2)
        parts = [
            write_shards(manifest, tmp_path / "parts", shard_size=2, part=Part(number, count))
            for number in reversed(range(1, count + 1))
        ]
        assert sum(part.utterances for part in parts) == whole.utterances == 7
        assert sorted(bad.utterance for part in parts for bad in part.bad) == ["u1", "u2", "u7"]
        assert not shard_index_path(tmp_path / "parts").exists()

        def contents(folder: Path) -> dict[str, bytes]:
            # Compressed files and the index hold the time at which they were written.
            files = [path for path in folder.iterdir() if path.suffix not in (".gz", ".npy")]
            return {path.name: path.read_bytes() for path in files}

        assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
        assert [cut.id for cut in cuts_of(tmp_path / "parts")] == [cut.id for cut in cuts_of(tmp_path / "whole")]
        # The whole finds nothing left to do but the index.
        assert write_shards(manifest, tmp_path / "parts", shard_size=2) == whole
        assert shard_index_path(tmp_path / "parts").exists()

    def test_an_incomplete_shard_is_written_again_and_others_are_kept(self, manifest: Path, tmp_path: Path) -> None:
        write_shards(manifest, tmp_path, shard_size=10)
        (tmp_path / "cuts.000001.jsonl.gz").unlink()
        (tmp_path / "partial.000001").mkdir()
        kept = (tmp_path / "recording.000002.tar").stat()
        write_shards(manifest, tmp_path, shard_size=10)
        assert len(cuts_of(tmp_path)) == 40
        assert (tmp_path / "recording.000002.tar").stat().st_mtime_ns == kept.st_mtime_ns

    def test_a_cut_of_a_long_recording_has_only_its_own_part(self, tmp_path: Path) -> None:
        whole = cut_of(write_audio(tmp_path / "long.flac", noise(12.0, seed=1)))
        parts = list(whole.cut_into_windows(4.0))
        manifest = write_manifest(tmp_path / "cuts.jsonl", parts)
        write_shards(manifest, tmp_path / "shards", shard_size=2)
        found = {cut.id: cut for cut in cuts_of(tmp_path / "shards")}
        for part in parts:
            assert np.array_equal(audio_of(found[part.id]), audio_of(part))

    @pytest.mark.parametrize("installed", [True, False])
    def test_opus_has_its_own_rate_whether_torchaudio_is_installed_or_not(
        self, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("lhotse.augmentation.torchaudio", "lhotse.shar.writers.audio"):
            monkeypatch.setattr(f"{module}.is_torchaudio_available", lambda: installed)
        cut = cut_of(write_audio(tmp_path / "a.wav", tone(2.0, 1000.0, rate=44_100), rate=44_100))
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut, cut.resample(22_050).with_id("resampled")])
        write_shards(manifest, tmp_path / "shards", form="opus")
        found = cuts_of(tmp_path / "shards")
        assert {cut.id for cut in found} == {"a", "resampled"}
        for cut in found:
            assert cut.sampling_rate == 48_000
            assert np.abs(np.fft.rfft(audio_of(cut))).argmax() == 2000  # cycles in two seconds

    def test_a_folder_with_shards_of_other_contents_is_refused(self, manifest: Path, shards: Path) -> None:
        for changes in ({"shard_size": 9}, {"seed": 1}, {"form": "wav"}):
            with pytest.raises(UserError, match=r"contains other shards \(.*; choose another folder"):
                write_shards(manifest, shards, **{"shard_size": 10, **changes})
        assert len(cuts_of(shards)) == 40

    def test_nothing_but_bad_audio_is_an_error(self, tmp_path: Path) -> None:
        paths = [write_audio(tmp_path / f"u{n}.flac", noise(2.0, seed=n)) for n in range(3)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
        for path in paths:
            path.unlink()
        for _ in range(2):
            with pytest.raises(
                UserError,
                match=r"no utterance can be used, so no shards were written; the first one: u\d .*: no such file",
            ):
                write_shards(manifest, tmp_path / "shards", shard_size=2)

    def test_an_unknown_format_is_one_line(self, manifest: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="--format aiff: choose one of flac, wav, opus, mp3"):
            write_shards(manifest, tmp_path, form="aiff")


class TestIndex:
    def test_it_has_every_utterance_in_its_place(self, three: Path) -> None:
        corpus = ShardCorpus([three])
        stored = list(corpus.read(np.arange(len(corpus))))
        for cut, expected, duration in zip(map(cut_from, stored), cuts_of(three), corpus.durations, strict=True):
            assert (cut.id, cut.duration) == (expected.id, duration)
            assert np.array_equal(audio_of(cut), audio_of(expected))
        assert np.diff(corpus.starts).tolist() == [14, 14, 12]

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_shards_from_elsewhere(self, three: Path, jobs: int) -> None:
        path = shard_index_path(three)
        written = path.read_bytes()
        path.unlink()
        assert index_shards(three, jobs=jobs) == IndexedShards(3, 40, [])
        assert path.read_bytes() == written

    def test_only_shards_that_are_new_or_have_changed_are_read(
        self, three: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = tmp_path_factory.mktemp("other")
        write_shards(manifest, other, shard_size=9, seed=1)
        for name in ("cuts.{}.jsonl.gz", "recording.{}.tar"):
            (other / name.format("000000")).replace(three / name.format("000001"))
            (other / name.format("000002")).replace(three / name.format("000003"))
        read: list[str] = []
        find = corpora_shard_index._find_utterances
        monkeypatch.setattr(
            corpora_shard_index, "_find_utterances", lambda shard: read.append(shard.cuts.name) or find(shard)
        )
        assert index_shards(three).utterances == 14 + 9 + 12 + 9
        assert read == ["cuts.000001.jsonl.gz", "cuts.000003.jsonl.gz"]
        corpus = ShardCorpus([three])
        assert [cut_from(one).id for one in corpus.read(np.arange(44))] == [cut.id for cut in cuts_of(three)]

    def test_what_was_done_before_a_stop_is_not_done_again(self, three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shard_index_path(three).unlink()
        monkeypatch.setattr(corpora_shard_index, "SAVE_SECONDS", -1.0)
        find = corpora_shard_index._find_utterances

        def stopped(shard: Shard) -> Any:
            if "000002" in shard.cuts.name:
                raise KeyboardInterrupt
            return find(shard)

        monkeypatch.setattr(corpora_shard_index, "_find_utterances", stopped)
        with pytest.raises(KeyboardInterrupt):
            index_shards(three)
        with pytest.raises(
            UserError, match="has 3 shards, but 2 are indexed; update the index with: w2vscale data ind"
        ):
            ShardCorpus([three])
        read: list[str] = []
        monkeypatch.setattr(
            corpora_shard_index, "_find_utterances", lambda shard: read.append(shard.cuts.name) or find(shard)
        )
        assert index_shards(three).utterances == 40
        assert read == ["cuts.000002.jsonl.gz"]

    def test_the_fingerprint_is_of_the_content(self, three: Path, manifest: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(three, tmp_path / "copy")
        found = stream_of([three], config_with()).describe()
        assert re.fullmatch(r"0.0 hours, 35 utterances, of shards [0-9a-f]{8}", found)
        assert stream_of([copy], config_with()).describe() == found
        (copy / "recording.000001.tar").touch()
        index_shards(copy)
        assert stream_of([copy], config_with()).describe() == found
        write_shards(manifest, tmp_path / "other", shard_size=14, seed=1)
        assert stream_of([tmp_path / "other"], config_with()).describe() != found

    def test_a_folder_without_one_is_refused(self, three: Path) -> None:
        shard_index_path(three).unlink()
        with pytest.raises(UserError, match=f"^{three}: has no index; create it with: w2vscale data index {three}$"):
            stream_of([three], config_with())

    def test_an_outdated_one_is_refused(self, three: Path) -> None:
        command = f"update the index with: w2vscale data index {three}$"
        archive = three / "recording.000001.tar"
        archive.write_bytes(archive.read_bytes() + bytes(512))
        with pytest.raises(UserError, match=f"^{archive}: changed since it was indexed; {command}"):
            stream_of([three], config_with())
        archive.unlink()
        (three / "cuts.000001.jsonl.gz").unlink()
        with pytest.raises(UserError, match=f"^{three}: has 2 shards, but 3 are indexed; {command}"):
            stream_of([three], config_with())

    @given(data=st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
    def test_a_damaged_one_is_refused(self, shards: Path, tmp_path: Path, data: st.DataObject) -> None:
        """Every byte is covered by a check, apart from those of the checksums of manifests and some of the headers."""
        for file in shards.iterdir():
            if not (tmp_path / file.name).exists():
                (tmp_path / file.name).symlink_to(file)
        whole = bytearray(shard_index_path(shards).read_bytes())
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= data.draw(st.integers(1, 255))
        cut = data.draw(st.sampled_from([len(whole), len(whole), place]))
        path = shard_index_path(tmp_path)
        path.unlink()
        path.write_bytes(whole[:cut])
        try:
            corpus = ShardCorpus([tmp_path])
        except UserError as error:
            message = str(error)
            assert re.search(r"^[^\n]*w2vscale data index [^\n]*$", message), message
        else:
            assert [cut_from(one).id for one in corpus.read(np.arange(40))] == [cut.id for cut in cuts_of(shards)]

    def test_places_that_lead_out_of_a_shard_are_refused(self, three: Path) -> None:
        """Also with checksums that are right."""
        records, places = (np.array(part) for part in open_shard_index(three))
        for field, row, value in (
            ("offset", 3, 10**12), ("offset", 3, -512), ("offset", 3, 0), ("size", 3, 2**31), ("line", 3, 1),
            ("duration", 3, np.nan), ("duration", 3, 0.0),
        ):  # fmt: skip
            changed, described = places.copy(), records.copy()
            changed[field][row] = value
            described["places_checksum"][0] = zlib.crc32(changed[:14].tobytes())
            write_shard_index(three, described, changed)
            with pytest.raises(UserError, match="damaged; replace it with: w2vscale data index"):
                open_shard_index(three)
        for field, number in (("utterances", -1), ("utterances", 2**62), ("utterances", 15)):
            described = records.copy()
            described[field][0] = number
            write_shard_index(three, described, places)
            with pytest.raises(UserError, match="damaged; replace it with: w2vscale data index"):
                open_shard_index(three)


def test_a_log_line_is_json(tmp_path: Path) -> None:
    paths = [write_audio(tmp_path / f"u{n}.flac", noise(2.0, seed=n)) for n in range(3)]
    manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
    paths[0].unlink()
    write_shards(manifest, tmp_path / "shards")
    (line,) = (tmp_path / "shards" / "bad_audio.000000.jsonl").read_text().splitlines()
    expected = {"utterance": "u0", "file": str(paths[0]), "kind": "missing", "reason": "no such file", "left_out": True}
    assert json.loads(line) == expected


def test_shards_can_be_opened_again_in_another_process(shards: Path) -> None:
    corpus = pickle.loads(pickle.dumps(ShardCorpus([shards])))
    assert [cut_from(one).id for one in corpus.read(np.arange(40))] == [cut.id for cut in cuts_of(shards)]
