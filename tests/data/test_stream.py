"""Shar shards: what is written, and the endless stream of micro-batches that is read from them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lhotse import CutSet, SupervisionSegment
from lhotse.cut import Cut
from lhotse.shar import SharWriter
from numpy.typing import NDArray

from tests.helpers.audio import cut_of, noise, tone, write_audio, write_manifest, write_text
from tests.helpers.batches import same
from tests.helpers.micro import MICRO_RUN
from tests.helpers.processes import Started
from w2vscale.config import Config, load_config
from w2vscale.corpora import shard_index as corpora_shard_index
from w2vscale.corpora.parallel import Part
from w2vscale.corpora.shar import write_shards
from w2vscale.corpora.shard_index import IndexedShards, bad_shards_path, index_shards
from w2vscale.data import shard_index
from w2vscale.data.assembly import Assembler
from w2vscale.data.audio import read_audio
from w2vscale.data.loading import loader_processes
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.data.shard_index import ShardCorpus, open_shard_index, shard_index_path, write_shard_index
from w2vscale.data.shards import Shard, StoredUtterance, read_utterances
from w2vscale.data.stream import Reader, StreamedMicroBatches, open_stream
from w2vscale.data.stream_plan import Share
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective
from w2vscale.training.loop import train

RATE = 16_000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 utterances of 0.5 to 4.4 seconds."""
    folder = tmp_path_factory.mktemp("stream")
    cuts = [cut_of(write_audio(folder / f"u{n:02d}.flac", noise(0.5 + 0.1 * n, seed=n))) for n in range(40)]
    return write_manifest(folder / "cuts.jsonl", cuts)


@pytest.fixture(scope="module")
def shards(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same utterances in four shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(manifest, folder, shard_size=10)
    return folder


def config_with(*overrides: str) -> Config:
    settings = ["data.mode=stream", "data.max_seconds=3", "data.min_seconds=1", "data.workers=0"]
    return load_config("tiny", [*settings, "batch.max_seconds=10", "batch.micro_batches=6", *overrides])


LONG = ("batch.micro_batches=12", "data.stream_buffer=15", "data.min_seconds=0.5")
"""Several blocks, and windows that several numbers of ranks can share."""


def stream_of(folders: list[Path], config: Config) -> StreamedMicroBatches:
    data = config.data.model_copy(update={"train": folders})
    assemble = Assembler(build_objective(config), config.model, seed=config.trainer.seed)
    return open_stream(assemble, model=config.model, data=data, batch=config.batch)


def cuts_of(folder: Path) -> list[Cut]:
    fields = {name: sorted(folder.glob(f"{name}.*")) for name in ("cuts", "recording")}
    return list(CutSet.from_shar(fields=fields))


def audio_of(cut: Cut) -> NDArray[np.float32]:
    samples = round(cut.duration * RATE)
    return read_audio(cut, sampling_rate=RATE, offset=0, length=samples, normalize=False)


def cut_from(stored: StoredUtterance) -> Cut:
    cut = stored.cut()
    assert isinstance(cut, Cut), cut
    return cut


def resident_megabytes(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def repeated(manifest: Path, path: Path, times: int) -> Path:
    """A manifest with all utterances of another several times."""
    cuts = [cut.with_id(f"{cut.id}-{n}") for n in range(times) for cut in CutSet.from_jsonl(manifest)]
    return write_manifest(path, cuts)


def rewrite(archive: Path, rename: Callable[[int, str], str | None]) -> None:
    """Rename the members of an archive, or leave out those without a new name."""
    members = []
    with tarfile.open(archive) as old:
        for place, member in enumerate(old):
            content = old.extractfile(member)
            assert content is not None
            member.name = rename(place, member.name) or ""
            members.append((member, content.read()))
    with tarfile.open(archive, "w") as new:
        for member, content in members:
            if member.name:
                new.addfile(member, io.BytesIO(content))


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


class TestMicroBatches:
    def windows(self, source: StreamedMicroBatches, *, updates: range, world_size: int = 1) -> list[list[MicroBatch]]:
        """The micro-batches of each update, by number."""
        size = source.plan.lanes * source.series_length
        ranks = [
            source.windows(updates, micro_batches=size, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        return [
            sorted((batch for window in windows for batch in window), key=lambda batch: batch.number)
            for windows in zip(*ranks, strict=True)
        ]

    @pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 1), (6, 0)])
    def test_an_update_is_the_same_for_any_number_of_ranks_and_processes(
        self, shards: Path, world_size: int, workers: int
    ) -> None:
        updates = range(5, 9)
        expected = self.windows(stream_of([shards], config_with(*LONG)), updates=updates)
        source = stream_of([shards], config_with(*LONG, f"data.workers={workers}"))
        found = self.windows(source, updates=updates, world_size=world_size)
        for number, one, other in zip(updates, found, expected, strict=True):
            assert [batch.number for batch in one] == list(range(12 * number, 12 * number + 12))
            assert all(same(*pair) for pair in zip(one, other, strict=True))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_run_that_starts_anywhere_continues_as_if_it_had_never_stopped(self, shards: Path, workers: int) -> None:
        source = stream_of([shards], config_with(*LONG, f"data.workers={workers}"))
        whole = self.windows(source, updates=range(6))
        for start in (1, 4):
            rest = self.windows(source, updates=range(start, 6))
            assert all(
                same(*pair) for pairs in zip(rest, whole[start:], strict=True) for pair in zip(*pairs, strict=True)
            )

    def test_they_are_those_of_random_access(self, shards: Path) -> None:
        source = stream_of([shards], config_with(*LONG))
        for batch in next(iter(self.windows(source, updates=range(3, 4)))):
            assert same(batch, source[batch.number])

    def test_they_fit_the_budget(self, shards: Path) -> None:
        source = stream_of([shards], config_with(*LONG))
        for window in self.windows(source, updates=range(5)):
            assert all(0 < batch.padded_samples <= 10 * RATE for batch in window)
            assert all(batch.weight > 0 and not batch.bad for batch in window)

    def test_they_have_utterances_of_similar_length(self, manifest: Path, tmp_path: Path) -> None:
        write_shards(manifest, tmp_path, shard_size=40)
        found = [
            batch
            for window in self.windows(stream_of([tmp_path], config_with()), updates=range(10))
            for batch in window
        ]
        audio, padded = sum(b.audio_samples for b in found), sum(b.padded_samples for b in found)
        assert 1 - audio / padded < 0.1

    @pytest.mark.parametrize(("world_size", "run"), [(1, 3), (2, 3), (3, 1)])
    def test_a_series_stays_together_in_the_window_of_a_rank(
        self, manifest: Path, tmp_path: Path, world_size: int, run: int
    ) -> None:
        """Runs of the greatest common divisor of the series, of three, and the window; the longest first."""
        write_shards(repeated(manifest, tmp_path / "many.jsonl", 8), tmp_path / "shards", shard_size=160)
        source = stream_of([tmp_path / "shards"], config_with("batch.micro_batches=12", "batch.same_bucket=3"))
        assert source.series_length == 3
        for rank in range(world_size):
            for window in source.windows(range(4, 6), micro_batches=12, rank=rank, world_size=world_size):
                runs = [window[start : start + run] for start in range(0, len(window), run)]
                longest = [max(max(batch.inputs.audio.samples) for batch in each) for each in runs]
                assert longest == sorted(longest, reverse=True)
                for each in runs:
                    assert len({batch.number // 3 for batch in each}) == 1
                    lengths = [max(batch.inputs.audio.samples) for batch in each]
                    assert lengths == sorted(lengths, reverse=True)

    def test_an_epoch_has_each_utterance_once(self, shards: Path) -> None:
        source = stream_of([shards], config_with())
        long_enough = sum(cut.duration >= 1.0 for cut in cuts_of(shards))
        size = source.plan.lanes * source.series_length
        last = -(-source.micro_batches // size)
        batches = [batch for window in self.windows(source, updates=range(last)) for batch in window]
        assert sum(batch.utterances for batch in batches[: source.micro_batches]) == long_enough == source.utterances
        assert source.left_out == 40 - long_enough

    @pytest.mark.parametrize("buffer", [1, 7, 1000])
    def test_no_more_than_the_buffer_is_held_for_each_lane(self, shards: Path, buffer: int) -> None:
        source = stream_of([shards], config_with(*LONG, f"data.stream_buffer={buffer}"))
        most = 0
        reader = Reader(source, Share(range(20), 12))
        for _ in reader:
            most = max(most, sum(map(len, reader.held.values())))
        assert most <= source.plan.lanes * buffer

    @pytest.mark.long
    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("workers", [0, 2])
    def test_memory_is_flat_over_2000_micro_batches(
        self, manifest: Path, tmp_path: Path, started: Started, workers: int
    ) -> None:
        """Resident memory of this process and of its loaders; the first micro-batches load libraries."""
        write_shards(repeated(manifest, tmp_path / "many.jsonl", 8), tmp_path / "shards", shard_size=100)
        settings = ("batch.micro_batches=20", "data.stream_buffer=50", f"data.workers={workers}")
        source = stream_of([tmp_path / "shards"], config_with(*settings))
        megabytes = []
        with loader_processes():
            # A loader process ends when it has loaded its last micro-batch, so not all windows are taken.
            for _ in islice(source.windows(range(120), micro_batches=20, rank=0, world_size=1), 100):
                processes = [os.getpid(), *(child.pid for child in started())]
                assert len(processes) == 1 + workers
                megabytes.append(sum(map(resident_megabytes, processes)))
        assert len(megabytes) == 100
        assert max(megabytes[50:]) - max(megabytes[10:50]) < 20

    def test_offsets_within_a_shard_ascend(self, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reads: list[NDArray[np.void]] = []

        def read(shard: Shard, places: NDArray[np.void], *, audio: bool) -> list[StoredUtterance]:
            reads.append(places)
            return read_utterances(shard, places, audio=audio)

        monkeypatch.setattr(shard_index, "read_utterances", read)
        source = stream_of([shards], config_with(*LONG))
        reads.clear()
        self.windows(source, updates=range(10))
        assert len(reads) > 4
        assert all((np.diff(places["offset"]) > 0).all() for places in reads)

    def test_long_utterances_are_cropped_at_a_new_sample_in_each_epoch(self, shards: Path) -> None:
        source = stream_of([shards], config_with())
        longest = int(np.argmax(source.corpus.durations))
        offsets = [
            int(planned.offsets[planned.utterances == longest][0])
            for planned in map(source.plan.micro_batch, range(4 * source.micro_batches))
            if longest in planned.utterances
        ]
        assert len(offsets) == len(set(offsets)) == 4

    def test_normalisation_is_over_the_whole_utterance(self, shards: Path) -> None:
        source = stream_of([shards], config_with("model.normalize_waveform=true"))
        longest = int(np.argmax(source.corpus.durations))
        cut = source.read(longest)
        assert isinstance(cut, Cut)
        whole = audio_of(cut)
        planned = next(one for one in map(source.plan.micro_batch, range(999)) if longest in one.utterances)
        place = int(np.flatnonzero(planned.utterances == longest)[0])
        batch = source[planned.number]
        start = sum(batch.inputs.audio.samples[:place])
        found = batch.inputs.audio.waveforms_BS[place, : planned.lengths[place]].numpy()
        part = whole[planned.offsets[place] : planned.offsets[place] + planned.lengths[place]]
        assert np.allclose(found, (part - whole.mean()) / whole.std(), atol=1e-4), start

    def test_objectives_that_need_whole_utterances_leave_out_long_ones(self, tmp_path: Path) -> None:
        cuts = [cut_of(write_audio(tmp_path / f"u{n}.flac", noise(1.0 + 0.5 * n, seed=n))) for n in range(8)]
        for cut in cuts:
            cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0, cut.duration, text="HELLO")]
        write_shards(write_manifest(tmp_path / "cuts.jsonl", cuts), tmp_path / "shards", shard_size=3)
        config = config_with("objective.name=ctc", "objective.vocabulary=letters", "data.max_seconds=3")
        source = stream_of([tmp_path / "shards"], config)
        assert (source.utterances, source.left_out) == (5, 3)
        assert {cut.id for cut in source.sample(8)} == {cut.id for cut in cuts}
        assert all(
            batch.weight == 5 * batch.utterances
            for window in self.windows(source, updates=range(3))
            for batch in window
        )

    def test_bad_audio_is_reported_with_its_shard(self, tmp_path: Path) -> None:
        silent = [cut_of(write_audio(tmp_path / f"s{n}.flac", np.zeros(2 * RATE, np.float32))) for n in range(2)]
        good = cut_of(write_audio(tmp_path / "good.flac", noise(2.0)))
        (tmp_path / "shards").mkdir()
        with SharWriter(str(tmp_path / "shards"), {"recording": "flac"}, shard_size=10) as writer:
            for cut in [good, *silent]:
                writer.write(cut)
        index_shards(tmp_path / "shards")
        source = stream_of([tmp_path / "shards"], config_with())
        (found,) = self.windows(source, updates=range(1))
        bad = {(one.utterance, one.kind, Path(one.file).name) for batch in found for one in batch.bad}
        assert bad == {(f"s{n}", "silent", "cuts.000000.jsonl.gz") for n in range(2)}

    def test_the_largest_fills_the_budget(self, shards: Path) -> None:
        batch = stream_of([shards], config_with()).largest()
        assert batch.inputs.audio.waveforms_BS.shape == (3, 3 * RATE)
        assert batch.weight > 0


def break_archive(folder: Path) -> Path:
    """Cut an archive short in the middle of an utterance."""
    archive = folder / "recording.000001.tar"
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    return archive


MANIFEST_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "other bytes": lambda whole: whole[: len(whole) // 2] + bytes(40) + whole[len(whole) // 2 + 40 :],
    "other lines": lambda whole: gzip.compress(b"[1, 2]\nnull\n"),
}


@pytest.fixture
def three(manifest: Path, tmp_path: Path) -> Path:
    """Three shards of at most 14 utterances."""
    write_shards(manifest, tmp_path, shard_size=14)
    return tmp_path


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


class TestBadInput:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no: no such folder of shards; make one with: w2vscale data shar"):
            stream_of([tmp_path / "no"], config_with())
        with pytest.raises(UserError, match=r"data.train names no folder"):
            stream_of([], config_with())

    def test_no_shards(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no shards"):
            stream_of([tmp_path], config_with())

    def test_two_manifests_of_a_shard(self, three: Path) -> None:
        (three / "cuts.000001.jsonl.gz.partial").touch()  # of an interrupted copy
        stream_of([three], config_with())
        (three / "cuts.000001.jsonl").touch()
        with pytest.raises(UserError, match=r"cuts.000001.jsonl.gz: also there without .gz; remove one of the two"):
            stream_of([three], config_with())

    def test_audio_missing(self, manifest: Path, tmp_path: Path) -> None:
        write_shards(manifest, tmp_path, shard_size=20)
        (tmp_path / "recording.000001.tar").unlink()
        with pytest.raises(UserError, match=r"cuts.000001.jsonl.gz: its audio is missing: no recording.000001.tar"):
            stream_of([tmp_path], config_with())

    def test_nothing_long_enough(self, shards: Path) -> None:
        with pytest.raises(UserError, match=rf"^{shards}: no utterance is long enough: .* \(data.min_seconds\)"):
            stream_of([shards], config_with("data.min_seconds=5", "data.max_seconds=6"))

    def test_settings_of_the_other_mode(self) -> None:
        for setting in ("mix.by=corpus", "batch.pad_to=bucket"):
            with pytest.raises(UserError, match=f"{setting} is for data.mode=index"):
                config_with(setting)


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


def test_a_run_says_what_is_left_out(three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_archive(three)
    lost = len(index_shards(three).bad)
    settings = [*MICRO_RUN, "data.mode=stream", f"data.train={three}", "data.min_seconds=0.75", "trainer.updates=4"]
    assert train(load_config("base", settings), tmp_path / "exp") == 0
    printed = capsys.readouterr().out
    assert re.search(rf"left out \d of {40 - lost} utterances: shorter than data.min_seconds", printed)
    assert f"left out {lost} utterances of damaged shards: see shards.bad_audio.jsonl beside them" in printed
    assert "stream: the loader processes of all ranks hold 4 blocks of up to 1000 utterances" in printed
