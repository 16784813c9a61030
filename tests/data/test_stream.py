"""Shar shards: what is written, and the endless stream of micro-batches that is read from them."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.shar import SharWriter
from numpy.typing import NDArray

from tests.helpers.audio import cut_of, noise, tone, write_audio, write_manifest, write_text
from tests.helpers.batches import same
from w2vscale.config import Config, load_config
from w2vscale.corpora.parallel import Part
from w2vscale.corpora.shar import write_shards
from w2vscale.data.assembly import Assembler
from w2vscale.data.audio import read_audio
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.data.stream import Reader, StreamedMicroBatches
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective

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


def stream_of(folders: list[Path], config: Config) -> StreamedMicroBatches:
    data = config.data.model_copy(update={"train": folders})
    assemble = Assembler(build_objective(config), config.model, seed=config.trainer.seed)
    return StreamedMicroBatches(assemble, model=config.model, data=data, batch=config.batch)


def cuts_of(folder: Path) -> list[Cut]:
    fields = {name: sorted(folder.glob(f"{name}.*")) for name in ("cuts", "recording")}
    return list(CutSet.from_shar(fields=fields))


def audio_of(cut: Cut) -> NDArray[np.float32]:
    samples = round(cut.duration * RATE)
    return read_audio(cut, sampling_rate=RATE, offset=0, length=samples, normalize=False)


def passes(source: StreamedMicroBatches, *, place: int, readers: int, count: int, start: int = 0) -> list[Cut]:
    return list(islice(Reader(source, start, place=place, readers=readers).utterances(), count))


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
        written = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir() if path.suffix != ".gz"}
        assert written == {
            path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.suffix != ".gz"
        }
        assert [cut.id for cut in cuts_of(tmp_path / "parts")] == [cut.id for cut in cuts_of(tmp_path / "whole")]
        # The whole finds nothing left to do.
        assert write_shards(manifest, tmp_path / "parts", shard_size=2) == whole

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


class TestReaders:
    @pytest.mark.parametrize("readers", [1, 2, 3, 4, 6, 9])
    def test_together_they_read_everything_once_a_pass(self, shards: Path, readers: int) -> None:
        source = stream_of([shards], config_with())
        long_enough = {cut.id for cut in cuts_of(shards) if cut.duration >= 1.0}
        found: Counter[str] = Counter()
        for place in range(readers):
            first_pass = Reader(source, 0, place=place, readers=readers).utterances(passes=1)
            found.update(cut.id for cut in first_pass)
        assert set(found) == long_enough and set(found.values()) == {1}

    def test_each_pass_and_a_resumed_run_have_orders_of_their_own(self, shards: Path) -> None:
        source = stream_of([shards], config_with())
        count = sum(cut.duration >= 1.0 for cut in cuts_of(shards))
        names = [cut.id for cut in passes(source, place=0, readers=1, count=2 * count)]
        resumed = [cut.id for cut in passes(source, place=0, readers=1, count=count, start=7)]
        assert sorted(names[:count]) == sorted(names[count:]) == sorted(resumed)
        assert names[:count] != names[count:] != resumed != names[:count]

    def test_long_utterances_are_cropped_at_a_new_offset_in_each_pass(self, shards: Path) -> None:
        source = stream_of([shards], config_with())
        starts: dict[str, set[float]] = {}
        for cut in passes(source, place=0, readers=1, count=150):
            assert 1.0 <= cut.duration <= 3.0
            starts.setdefault(cut.id, set()).add(cut.start)
        assert len(starts["u39"]) == 4

    def test_too_few_utterances_for_the_readers_is_an_error(self, shards: Path) -> None:
        source = stream_of([shards], config_with())
        with pytest.raises(UserError, match=r"loader process 99 of 100 finds no utterance .* set data.workers lower"):
            passes(source, place=99, readers=100, count=1)


class TestMicroBatches:
    def windows(self, source: StreamedMicroBatches, *, updates: range, world_size: int = 1) -> list[MicroBatch]:
        return [
            batch
            for rank in range(world_size)
            for window in source.windows(updates, micro_batches=6, rank=rank, world_size=world_size)
            for batch in window
        ]

    def test_they_are_numbered_as_in_a_plan_and_fit_the_budget(self, shards: Path) -> None:
        source = stream_of([shards], config_with())
        for world_size in (1, 2, 3):
            found = self.windows(source, updates=range(5, 12), world_size=world_size)
            assert sorted(batch.number for batch in found) == list(range(30, 72))
            assert all(0 < batch.padded_samples <= 10 * RATE for batch in found)
            assert all(batch.weight > 0 and not batch.bad for batch in found)

    def test_they_have_utterances_of_similar_length(self, shards: Path) -> None:
        source = stream_of([shards], config_with("data.stream_buffer=300"))
        found = self.windows(source, updates=range(10))
        audio, padded = sum(b.audio_samples for b in found), sum(b.padded_samples for b in found)
        assert 1 - audio / padded < 0.1

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(("world_size", "run"), [(1, 3), (2, 3), (3, 1)])
    def test_a_series_stays_together_in_the_window_of_a_rank(
        self, shards: Path, workers: int, world_size: int, run: int
    ) -> None:
        """Runs of the greatest common divisor of the series, of three, and the window."""
        settings = (
            "batch.micro_batches=12",
            "batch.same_bucket=3",
            "data.stream_buffer=400",
            f"data.workers={workers}",
        )
        source = stream_of([shards], config_with(*settings))
        bounds = source.bucket_bounds(run)
        assert len(bounds) > 2
        for rank in range(world_size):
            windows = source.windows(range(4, 9), micro_batches=6, rank=rank, world_size=world_size)
            found = [batch for window in windows for batch in window]
            assert [batch.number for batch in found] == list(range(24 + rank, 54, world_size))
            assert all(0 < batch.padded_samples <= 10 * RATE for batch in found)
            for start in range(0, len(found), run):
                samples = [size for batch in found[start : start + run] for size in batch.inputs.audio.samples]
                assert len(set(np.searchsorted(bounds, np.array(samples) / RATE))) == 1

    def test_longer_series_need_wider_buckets(self, shards: Path) -> None:
        source = stream_of([shards], config_with("data.stream_buffer=400"))
        counts = [len(source.bucket_bounds(run)) for run in (1, 8, 30, 1000)]
        assert counts[0] > counts[1] > counts[2] > counts[3] == 0

    @pytest.mark.parametrize(("buffer", "series"), [(15, 4), (24, 8), (110, 2), (1000, 8)])
    def test_every_micro_batch_is_full_because_series_are_as_long_as_the_buffer_allows(
        self, shards: Path, buffer: int, series: int
    ) -> None:
        settings = ("batch.micro_batches=32", "batch.same_bucket=8", f"data.stream_buffer={buffer}")
        source = stream_of([shards], config_with(*settings))
        assert source.series_length == series
        bounds = np.array(source.bucket_bounds(series))
        for batch in next(source.windows(range(1), micro_batches=32, rank=0, world_size=1)):
            bucket = int(np.searchsorted(bounds, max(batch.inputs.audio.samples) / RATE))
            assert batch.utterances == int(10 / bounds[bucket])

    def test_a_buffer_that_is_too_small_for_them_is_an_error(self, shards: Path) -> None:
        with pytest.raises(UserError, match=r"data\.stream_buffer=2: .* 3 are needed"):
            stream_of([shards], config_with("data.stream_buffer=2"))

    def test_the_same_start_gives_the_same_micro_batches(self, shards: Path) -> None:
        config = config_with("data.workers=2")
        again = [self.windows(stream_of([shards], config), updates=range(3)) for _ in range(2)]
        assert all(same(one, other) for one, other in zip(*again, strict=True))

    def test_bad_audio_is_reported_with_its_shard(self, shards: Path, tmp_path: Path) -> None:
        silent = [cut_of(write_audio(tmp_path / f"s{n}.flac", np.zeros(2 * RATE, np.float32))) for n in range(2)]
        good = cut_of(write_audio(tmp_path / "good.flac", noise(2.0)))
        (tmp_path / "shards").mkdir()
        with SharWriter(str(tmp_path / "shards"), {"recording": "flac"}, shard_size=10) as writer:
            for cut in [*silent, good]:
                writer.write(cut)
        source = stream_of([tmp_path / "shards"], config_with())
        found = self.windows(source, updates=range(1))
        bad = {(one.utterance, one.kind, Path(one.file).name) for batch in found for one in batch.bad}
        assert bad == {(f"s{n}", "silent", "cuts.000000.jsonl.gz") for n in range(2)}

    def test_the_largest_fills_the_budget(self, shards: Path) -> None:
        batch = stream_of([shards], config_with()).largest()
        assert batch.inputs.audio.waveforms_BS.shape == (3, 3 * RATE)
        assert batch.weight > 0


class TestDamagedShards:
    """Other shards are still read, and lost utterances are reported."""

    @pytest.fixture
    def three(self, manifest: Path, tmp_path: Path) -> Path:
        write_shards(manifest, tmp_path, shard_size=14)
        return tmp_path

    def lost(self, folder: Path) -> list[BadAudio]:
        source = stream_of([folder], config_with("data.min_seconds=0.5"))
        windows = source.windows(range(4), micro_batches=6, rank=0, world_size=1)
        batches = [batch for window in windows for batch in window]
        assert all(batch.utterances > 0 for batch in batches)
        return list({bad.utterance: bad for batch in batches for bad in batch.bad}.values())

    def test_an_archive_cut_short(self, three: Path) -> None:
        archive = three / "recording.000001.tar"
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
        in_shard = {cut.id for cut in CutSet.from_jsonl(three / "cuts.000001.jsonl.gz")}
        lost = self.lost(three)
        assert {bad.utterance for bad in lost} < in_shard and len(lost) > 3
        assert {(bad.file, bad.left_out) for bad in lost} == {(str(archive), True)}
        assert all(bad.reason.startswith("its shard cannot be read: ") and "\n" not in bad.reason for bad in lost)

    def test_a_member_that_would_fill_the_memory_is_not_read(self, three: Path) -> None:
        """A compressed archive of a few kilobytes."""
        first = CutSet.from_jsonl(three / "cuts.000001.jsonl.gz")[0].id
        header = tarfile.TarInfo(f"{first}.flac")
        header.size = 10**12
        (three / "recording.000001.tar").write_bytes(gzip.compress(header.tobuf() + bytes(2**20)))
        lost = self.lost(three)
        assert {bad.utterance for bad in lost} <= {cut.id for cut in CutSet.from_jsonl(three / "cuts.000001.jsonl.gz")}
        assert first in {bad.utterance for bad in lost}
        assert all("1,000,000,000,000 bytes; at most" in bad.reason for bad in lost)

    @pytest.mark.parametrize("damage", ["cut short", "other bytes", "other lines"])
    def test_a_manifest(self, three: Path, damage: str) -> None:
        path = three / "cuts.000000.jsonl.gz"  # the one that buckets are first looked for in
        whole = path.read_bytes()
        path.write_bytes(
            {
                "cut short": whole[: len(whole) // 2],
                "other bytes": whole[:20] + bytes(40) + whole[60:],
                "other lines": gzip.compress(b"[1, 2]\nnull\n"),
            }[damage]
        )
        assert {bad.file for bad in self.lost(three)} == {str(path)}

    def test_all_of_them_is_an_error_that_names_one(self, three: Path) -> None:
        for archive in three.glob("*.tar"):
            archive.write_bytes(b"")
        with pytest.raises(UserError, match=r"recording.00000\d.tar: .*cannot be read: .* none of its shards"):
            self.lost(three)
        for path in three.glob("cuts.*"):
            path.write_bytes(b"")
        with pytest.raises(UserError, match=r"cuts.000000.jsonl.gz: .*; the other 2 shards have none either"):
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

    def test_audio_missing(self, manifest: Path, tmp_path: Path) -> None:
        write_shards(manifest, tmp_path, shard_size=20)
        (tmp_path / "recording.000001.tar").unlink()
        with pytest.raises(UserError, match=r"cuts.000001.jsonl.gz: its audio is missing: no recording.000001.tar"):
            stream_of([tmp_path], config_with())

    def test_nothing_long_enough(self, shards: Path) -> None:
        with pytest.raises(UserError, match=r"no utterance lasts 5 seconds \(data.min_seconds\)"):
            stream_of([shards], config_with("data.min_seconds=5", "data.max_seconds=6"))

    def test_an_objective_that_needs_whole_utterances(self, shards: Path) -> None:
        with pytest.raises(UserError, match=r"data.mode=stream crops utterances, .*; set data.mode=index"):
            stream_of([shards], config_with("objective.name=ctc", "objective.vocabulary=letters"))

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
