"""The endless stream of micro-batches that is read from shards."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from lhotse import SupervisionSegment
from lhotse.cut import Cut
from lhotse.shar import SharWriter
from numpy.typing import NDArray

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.batches import same
from tests.helpers.processes import Started
from tests.helpers.shards import (
    LONG,
    RATE,
    audio_of,
    config_with,
    cuts_of,
    repeated,
    resident_megabytes,
    stream_of,
)
from w2vscale.corpora.shar import write_shards
from w2vscale.corpora.shard_index import index_shards
from w2vscale.data import shard_index
from w2vscale.data.loading import loader_processes
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.shards import Shard, StoredUtterance, read_utterances
from w2vscale.data.stream import Reader, StreamedMicroBatches
from w2vscale.data.stream_plan import Share
from w2vscale.errors import UserError


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
