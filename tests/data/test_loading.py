"""Audio of micro-batches: what is read, what is refused and why, and that nothing else depends on it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray

from tests.helpers.audio import SmallCorpus, cut_of, noise, tone, write_audio, write_manifest, write_text
from tests.helpers.processes import Started
from w2vscale.config import Config, load_config
from w2vscale.corpora.prepare import prepare_folder
from w2vscale.data.audio import AudioError, read_audio
from w2vscale.data.inputs import PretrainingInputs
from w2vscale.data.loading import MicroBatches, check_sample, loader_processes, make_plan, validation_batches
from w2vscale.data.manifest import Corpus, build_index
from w2vscale.data.micro_batch import BadAudio, MicroBatch, make_inputs, shortest_samples
from w2vscale.data.plan import rank_window
from w2vscale.errors import UserError
from w2vscale.objectives.contrastive_model import Wav2Vec2ForPretraining
from w2vscale.objectives.criterion import PretrainingCriterion

RATE = 16_000


def config_with(*overrides: str) -> Config:
    """Tiny, on micro-batches of a few utterances, loaded in the main process."""
    settings = ["data.max_seconds=3", "data.min_seconds=1", "data.workers=0", "batch.max_seconds=10"]
    return load_config("tiny", [*settings, "batch.micro_batches=2", *overrides])


def dataset_of(manifest: Path, config: Config, *, seed: int = 7) -> MicroBatches:
    corpus = Corpus([manifest])
    return MicroBatches(corpus, make_plan(corpus, config, seed=seed), config, seed=seed)


def read(cut: Cut, *, offset: int = 0, length: int | None = None, normalize: bool = False) -> NDArray[np.float32]:
    whole = round(cut.duration * RATE)
    return read_audio(
        cut, sampling_rate=RATE, offset=offset, length=whole if length is None else length, normalize=normalize
    )


def same_inputs(one: PretrainingInputs, other: PretrainingInputs) -> bool:
    return all(
        torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        for mine, theirs in zip(one, other, strict=True)
    )


def same(one: MicroBatch, other: MicroBatch) -> bool:
    plain = [dataclasses.replace(batch, inputs=None) for batch in (one, other)]  # type: ignore[arg-type]
    return plain[0] == plain[1] and same_inputs(one.inputs, other.inputs)


def strongest_frequency(audio: NDArray[np.float32]) -> float:
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(audio.size)))
    return float(np.argmax(spectrum) * RATE / audio.size)


class TestReadingAudio:
    @pytest.mark.parametrize("suffix", [".flac", ".wav", ".ogg", ".opus"])
    def test_a_crop_equals_the_slice_of_the_whole(self, suffix: str, tmp_path: Path) -> None:
        cut = cut_of(write_audio(tmp_path / f"a{suffix}", noise(3.21, seed=1)))
        whole = read(cut)
        assert whole.dtype == np.float32 and whole.shape == (51_360,)
        for offset, length in ((0, 16_000), (1, 1), (777, 30_001), (51_360 - 20_000, 20_000), (51_359, 1), (3, 51_357)):
            if length > 1:  # a single sample is refused as silence
                assert np.array_equal(read(cut, offset=offset, length=length), whole[offset : offset + length])

    def test_an_mp3_crop_is_the_slice_of_the_whole_but_for_the_decoders_start(self, tmp_path: Path) -> None:
        cut = cut_of(write_audio(tmp_path / "a.mp3", noise(3.0, seed=1)))
        crop, whole = read(cut, offset=12_345, length=20_000), read(cut)[12_345:32_345]
        assert np.allclose(crop[3000:], whole[3000:], atol=1e-4)

    def test_a_crop_of_a_window_is_counted_from_the_windows_start(self, tmp_path: Path) -> None:
        audio = noise(5.0, seed=1)
        window = cut_of(write_audio(tmp_path / "a.wav", audio)).truncate(offset=1.5, duration=3.0)
        assert np.allclose(read(window), audio[24_000:72_000], atol=1e-4)
        assert np.allclose(read(window, offset=8_000, length=16_000), audio[32_000:48_000], atol=1e-4)

    def test_normalisation_takes_mean_and_variance_of_the_whole_utterance(self, tmp_path: Path) -> None:
        audio = np.concatenate([0.1 * noise(2.0, seed=1), noise(2.0, seed=2)]) + np.float32(0.05)
        cut = cut_of(write_audio(tmp_path / "a.wav", audio, subtype="FLOAT"))
        expected = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)
        assert np.allclose(read(cut, normalize=True), expected, atol=1e-5)
        quiet = read(cut, offset=1000, length=20_000, normalize=True)
        assert np.allclose(quiet, expected[1000:21_000], atol=1e-5)
        assert quiet.std() < 0.3

    @pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
    def test_other_rates_are_resampled_to_the_right_length_and_pitch(self, rate: int, tmp_path: Path) -> None:
        cut = cut_of(write_audio(tmp_path / "a.wav", tone(3.3, 1000.0, rate=rate), rate=rate))
        assert read(cut).shape == (52_800,)
        assert strongest_frequency(read(cut)) == pytest.approx(1000.0, abs=1.0)
        for offset in (0, 12_345, 52_800 - 32_000):
            crop = read(cut, offset=offset, length=32_000)
            assert crop.shape == (32_000,)
            assert strongest_frequency(crop) == pytest.approx(1000.0, abs=1.0)

    def test_a_resampled_crop_lies_where_it_was_asked_for(self, tmp_path: Path) -> None:
        cut = cut_of(write_audio(tmp_path / "a.wav", noise(3.0, rate=48_000, seed=1), rate=48_000))
        crop, whole = read(cut, offset=10_000, length=20_000), read(cut)[10_000:30_000]
        assert np.allclose(crop[200:-200], whole[200:-200], atol=1e-3)

    @pytest.mark.parametrize("installed", [True, False])
    def test_resampling_does_not_depend_on_torchaudio(
        self, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut = cut_of(write_audio(tmp_path / "a.wav", noise(3.0, rate=44_100, seed=1), rate=44_100))
        twice = cut.resample(22_050)  # one transform from the manifest, one of ours
        available = "lhotse.augmentation.torchaudio.is_torchaudio_available"
        monkeypatch.setattr(available, lambda: True)
        expected = [lhotse.load_audio()[0] for lhotse in (cut.resample(RATE), twice.resample(RATE))]
        monkeypatch.setattr(available, lambda: installed)
        found = [read(cut), read(twice)]
        assert all(map(np.array_equal, found, expected))

    def test_channels_are_averaged(self, tmp_path: Path) -> None:
        left, right = noise(2.0, seed=1), noise(2.0, seed=2)
        cut = cut_of(write_audio(tmp_path / "a.wav", np.stack([left, right], axis=1)))
        assert np.allclose(read(cut), (left + right) / 2, atol=1e-4)
        assert np.allclose(read(cut, offset=500, length=9_000), ((left + right) / 2)[500:9_500], atol=1e-4)

    @pytest.mark.parametrize("samples", [16_001, 33_333, 44_444, 52_799])
    def test_durations_that_are_no_round_number_give_every_sample(self, samples: int, tmp_path: Path) -> None:
        audio = noise(samples / RATE, seed=1)
        cut = cut_of(write_audio(tmp_path / "a.flac", audio))
        assert np.allclose(read(cut), audio, atol=1e-4)
        last = read(cut, offset=samples - 9_999, length=9_999)
        assert np.allclose(last, audio[-9_999:], atol=1e-4)

    def test_mixed_formats_of_a_prepared_folder_can_all_be_read(self, mixed_audio: Path, tmp_path: Path) -> None:
        (written,) = prepare_folder(mixed_audio, tmp_path)
        build_index(written.path)
        dataset = dataset_of(written.path, config_with())
        batches = [dataset[0, number] for number in range(dataset.plan.per_epoch)]
        assert [batch.bad for batch in batches] == [()] * len(batches)
        assert sum(batch.utterances for batch in batches) == 6


def _with_sample(audio: NDArray[np.float32], value: float) -> NDArray[np.float32]:
    changed = audio.copy()
    changed[20_000] = value
    return changed


def _says(cut: Cut, **changes: object) -> Cut:
    recording = dataclasses.replace(cut.recording, **changes)
    return dataclasses.replace(cut, recording=recording, duration=recording.duration)


def _missing(path: Path) -> Cut:
    cut = cut_of(write_audio(path / "a.flac", noise(3.0)))
    (path / "a.flac").unlink()
    return cut


def _overwritten(path: Path, content: bytes, suffix: str = ".flac") -> Cut:
    cut = cut_of(write_audio(path / f"a{suffix}", noise(3.0)))
    (path / f"a{suffix}").write_bytes(content)
    return cut


def _half(path: Path, suffix: str) -> Cut:
    cut = cut_of(write_audio(path / f"a{suffix}", noise(3.0)))
    content = (path / f"a{suffix}").read_bytes()
    (path / f"a{suffix}").write_bytes(content[: len(content) // 2])
    return cut


def _wav(path: Path, audio: NDArray[np.float32], *, rate: int = RATE) -> Cut:
    return cut_of(write_audio(path / "a.wav", audio, rate=rate, subtype="FLOAT"))


BAD: dict[str, tuple[Callable[[Path], Cut], str]] = {
    "missing": (_missing, "no such file"),
    "text": (lambda path: _overwritten(path, b"hello\n" * 99), "not readable as audio: Format not recognised"),
    "text named opus": (lambda path: _overwritten(path, b"hello\n" * 99, ".opus"), "not readable as audio"),
    "empty file": (lambda path: _overwritten(path, b""), "not readable as audio"),
    "half a flac": (lambda path: _half(path, ".flac"), "cannot be decoded"),
    "half a wav": (lambda path: _half(path, ".wav"), "the manifest says 3.000 s"),
    "half an mp3": (lambda path: _half(path, ".mp3"), "of 48000 samples"),
    "half an opus": (lambda path: _half(path, ".opus"), "the manifest says 3.000 s"),
    "not a number": (lambda path: _wav(path, _with_sample(noise(3.0), np.nan)), "not finite"),
    "infinite": (lambda path: _wav(path, _with_sample(noise(3.0), np.inf)), "not finite"),
    "silence": (lambda path: _wav(path, np.zeros(48_000, np.float32)), "is silent"),
    "a constant": (lambda path: _wav(path, np.full(48_000, 0.25, np.float32)), "is silent"),
    "another rate": (
        lambda path: _says(_wav(path, noise(3.0, rate=8_000), rate=8_000), sampling_rate=RATE, num_samples=48_000),
        "sampling rate is 8000 Hz, the manifest says 16000 Hz",
    ),
    "a longer duration": (
        lambda path: _says(_wav(path, noise(3.0)), num_samples=80_000, duration=5.0),
        "duration is 3.000 s, the manifest says 5.000 s",
    ),
    "a shorter duration": (
        lambda path: _says(_wav(path, noise(3.0)), num_samples=32_000, duration=2.0),
        "duration is 3.000 s, the manifest says 2.000 s",
    ),
    "a cut beyond its recording": (
        lambda path: dataclasses.replace(_wav(path, noise(3.0)), duration=5.0),
        "ends at 5.000 s, after its recording's 3.000 s",
    ),
}


class TestBadAudio:
    @pytest.mark.parametrize("kind", BAD)
    @pytest.mark.parametrize("normalize", [False, True])
    def test_the_reason_is_one_line(self, kind: str, normalize: bool, tmp_path: Path) -> None:
        make, reason = BAD[kind]
        cut = make(tmp_path)
        with pytest.raises(AudioError) as caught:
            read(cut, normalize=normalize)
        message = str(caught.value)
        assert reason in message
        assert "\n" not in message and "torchaudio" not in message

    @pytest.mark.parametrize("kind", ["missing", "text", "silence", "another rate"])
    def test_a_crop_of_it_is_refused_too(self, kind: str, tmp_path: Path) -> None:
        make, reason = BAD[kind]
        with pytest.raises(AudioError, match=reason):
            read(make(tmp_path), offset=4_000, length=20_000)

    def test_a_duration_that_differs_by_rounding_is_accepted_and_padded(self, tmp_path: Path) -> None:
        cut = _wav(tmp_path, noise(3.0))
        longer = _says(cut, num_samples=48_010, duration=48_010 / RATE)
        assert read(longer).shape == (48_010,)


class TestMicroBatches:
    def write(self, folder: Path, count: int = 9) -> tuple[Path, list[Path]]:
        folder.mkdir()
        paths = [write_audio(folder / f"u{n}.wav", noise(1.5 + 0.3 * n, seed=n)) for n in range(count)]
        return write_manifest(folder / "cuts.jsonl", [cut_of(path) for path in paths]), paths

    def test_audio_masks_and_sizes_are_those_of_the_plan(self, small_corpus: SmallCorpus) -> None:
        config = config_with()
        dataset = dataset_of(small_corpus.train, config)
        for number in (0, 3, dataset.plan.per_epoch + 1):
            planned, batch = dataset.plan.micro_batch(number), dataset[5, number]
            assert (batch.update, batch.number, batch.bad) == (5, number, ())
            assert batch.inputs.lengths_B.tolist() == planned.lengths.tolist()
            assert batch.utterances == planned.utterances.size
            assert batch.audio_samples == planned.lengths.sum()
            assert batch.padded_samples == planned.utterances.size * planned.longest
            assert batch.padded_samples <= config.batch.max_seconds * RATE
            for row, (utterance, offset, length) in enumerate(
                zip(planned.utterances, planned.offsets, planned.lengths, strict=True)
            ):
                audio = read(dataset.corpus.cut(int(utterance)), offset=int(offset), length=int(length))
                assert np.array_equal(batch.inputs.waveforms_BS[row, :length].numpy(), audio)
                assert not batch.inputs.waveforms_BS[row, length:].any()
                assert batch.inputs.mask_BT[row].any()
                assert not batch.inputs.mask_BT[row, batch.inputs.frames_B[row] :].any()

    def test_lists_of_masked_frames_say_what_the_mask_says(self, small_corpus: SmallCorpus) -> None:
        config = config_with()
        batch = dataset_of(small_corpus.train, config)[0, 1]
        inputs = batch.inputs
        assert inputs.mask_BT.nonzero().tolist() == torch.stack([inputs.utterance_M, inputs.frame_M], dim=1).tolist()
        assert batch.weight == int(inputs.mask_BT.sum()) == inputs.masked[0]
        for row in range(batch.utterances):
            mine = inputs.utterance_M == row
            assert inputs.slot_M[mine].tolist() == list(range(int(mine.sum())))
            assert (inputs.negatives_MK[mine] < mine.sum()).all()
        assert (inputs.negatives_MK != inputs.slot_M[:, None]).all()
        assert inputs.negatives_MK.shape == (batch.weight, config.model.negatives)
        assert inputs.slots == max(int((inputs.utterance_M == row).sum()) for row in range(batch.utterances))

    def test_a_bad_utterance_is_named_and_changes_no_other(self, tmp_path: Path) -> None:
        config = config_with("batch.max_seconds=16")
        manifest, paths = self.write(tmp_path / "corpus")
        whole = dataset_of(manifest, config)
        number = next(n for n in range(whole.plan.per_epoch) if whole.plan.micro_batch(n).utterances.size >= 4)
        before = whole[0, number]
        gone = int(whole.plan.micro_batch(number).utterances[1])
        write_text(paths[gone])
        after = whole[0, number]
        assert after.bad == (
            BadAudio(f"u{gone}", str(paths[gone]), "undecodable", "not readable as audio: Format not recognised"),
        )
        assert after.utterances == before.utterances - 1
        rows = [row for row in range(before.utterances) if row != 1]
        for new, old in enumerate(rows):
            samples, frames = int(before.inputs.lengths_B[old]), int(before.inputs.frames_B[old])
            assert torch.equal(after.inputs.waveforms_BS[new, :samples], before.inputs.waveforms_BS[old, :samples])
            assert torch.equal(after.inputs.mask_BT[new, :frames], before.inputs.mask_BT[old, :frames])
            mine, theirs = after.inputs.utterance_M == new, before.inputs.utterance_M == old
            assert torch.equal(after.inputs.negatives_MK[mine], before.inputs.negatives_MK[theirs])

    def test_without_any_usable_utterance_it_is_silence_that_weighs_nothing(self, tmp_path: Path) -> None:
        config = config_with()
        manifest, paths = self.write(tmp_path / "corpus", count=3)
        dataset = dataset_of(manifest, config)
        for path in paths:
            path.unlink()
        batch = dataset[0, 0]
        assert len(batch.bad) == dataset.plan.micro_batch(0).utterances.size
        assert (batch.weight, batch.audio_samples, batch.utterances) == (0, 0, 0)
        assert batch.inputs.waveforms_BS.shape == (1, shortest_samples(config.model))
        assert not batch.inputs.waveforms_BS.any() and not batch.inputs.mask_BT.any()
        assert batch.inputs.negatives_MK.shape == (0, config.model.negatives)

    def test_a_manifest_that_changes_under_the_run_costs_its_utterances_not_the_run(self, tmp_path: Path) -> None:
        manifest, _ = self.write(tmp_path / "corpus", count=3)
        dataset = dataset_of(manifest, config_with())
        manifest.write_bytes(b"x" * manifest.stat().st_size)
        batch = dataset[0, 0]
        assert batch.utterances == 0
        assert all(str(manifest) in bad.reason for bad in batch.bad)

    def test_a_copy_made_for_another_process_gives_the_same(self, small_corpus: SmallCorpus) -> None:
        dataset = dataset_of(small_corpus.train, config_with())
        expected = dataset[0, 2]
        assert same(pickle.loads(pickle.dumps(dataset))[0, 2], expected)


class TestDraws:
    def inputs(
        self, lengths: Sequence[int], *, places: Sequence[int] | None = None, number: int = 3, seed: int = 1
    ) -> PretrainingInputs:
        audio = [np.ones(length, np.float32) for length in lengths]
        places = range(len(lengths)) if places is None else places
        return make_inputs(audio, places, number=number, seed=seed, config=config_with().model)

    def draws(self, inputs: PretrainingInputs, row: int) -> tuple[list[bool], list[list[int]]]:
        frames = int(inputs.frames_B[row])
        return inputs.mask_BT[row, :frames].tolist(), inputs.negatives_MK[inputs.utterance_M == row].tolist()

    def test_an_utterances_masks_do_not_depend_on_its_company(self) -> None:
        alone = self.inputs([48_000], places=[2])
        assert self.draws(self.inputs([20_000, 30_000, 48_000]), 2) == self.draws(alone, 0)
        assert self.draws(self.inputs([48_000, 64_000], places=[2, 5]), 0) == self.draws(alone, 0)

    def test_they_change_with_the_place_the_number_and_the_seed(self) -> None:
        found = [
            self.draws(self.inputs([48_000], places=[place], number=number, seed=seed), 0)
            for place, number, seed in ((0, 3, 1), (1, 3, 1), (0, 4, 1), (0, 3, 2))
        ]
        assert all(one != other for i, one in enumerate(found) for other in found[:i])

    def test_the_shortest_utterance_that_is_kept_can_be_masked(self) -> None:
        for preset in ("tiny", "base", "base_prenorm"):
            model = load_config(preset).model
            audio = np.ones(shortest_samples(model), np.float32)
            inputs = make_inputs([audio], [0], number=0, seed=0, config=model)
            assert inputs.masked[0] > model.mask_length
            assert (inputs.negatives_MK != inputs.slot_M[:, None]).all()


class TestWindows:
    def test_workers_change_nothing(self, small_corpus: SmallCorpus) -> None:
        found = []
        for workers in (0, 2):
            config = config_with(f"data.workers={workers}", "data.prefetch=1")
            dataset = dataset_of(small_corpus.train, config)
            found.append([batch for window in dataset.windows(range(2, 6)) for batch in window])
        assert len(found[0]) == 8
        assert all(same(one, other) for one, other in zip(*found, strict=True))

    def test_each_rank_gets_its_part_of_every_update(self, small_corpus: SmallCorpus) -> None:
        config = config_with("batch.micro_batches=4")
        dataset = dataset_of(small_corpus.train, config)
        for rank in (0, 1):
            found = list(dataset.windows(range(3, 5), rank=rank, world_size=2))
            assert [[(b.update, b.number) for b in window] for window in found] == [
                [(u, n) for n in rank_window(dataset.plan, u, micro_batches=4, rank=rank, world_size=2)] for u in (3, 4)
            ]

    def test_a_run_that_starts_later_gets_what_a_longer_one_gets_there(self, small_corpus: SmallCorpus) -> None:
        config = config_with()
        dataset = dataset_of(small_corpus.train, config)
        whole = list(dataset.windows(range(6)))
        late = list(dataset_of(small_corpus.train, config).windows(range(4, 6)))
        pairs = [pair for now, then in zip(late, whole[4:], strict=True) for pair in zip(now, then, strict=True)]
        assert all(same(one, other) for one, other in pairs)

    def test_no_update_loads_nothing(self, small_corpus: SmallCorpus) -> None:
        config = config_with()
        assert list(dataset_of(small_corpus.train, config).windows(range(0))) == []


def test_manifests_of_equal_size_and_other_content_are_told_apart(tmp_path: Path) -> None:
    described = []
    for folder, name in (("one", "a"), ("copy", "a"), ("other", "b")):
        cuts = [cut_of(write_audio(tmp_path / f"{n}.wav", noise(2.0, seed=n)), identifier=f"{name}{n}") for n in (1, 2)]
        (tmp_path / folder).mkdir()
        manifest = write_manifest(tmp_path / folder / "cuts.jsonl", cuts)
        described.append(dataset_of(manifest, config_with()).describe())
    assert described[0] == described[1] != described[2]


class TestLoaderProcesses:
    def test_one_that_is_killed_is_one_line_that_says_what_to_do_and_ends_the_others(
        self, small_corpus: SmallCorpus, started: Started
    ) -> None:
        config = config_with("data.workers=2", "data.prefetch=1")

        def read_until_one_dies() -> None:
            with loader_processes():
                for update, _ in enumerate(dataset_of(small_corpus.train, config).windows(range(100_000))):
                    if update == 2:
                        started()[0].kill()

        with pytest.raises(UserError) as caught:
            read_until_one_dies()
        message = str(caught.value)
        assert re.match(r"a loader process \(pid [\d, ]+\) (was killed \(Killed\)|died): .*data\.workers", message), (
            message
        )
        assert "\n" not in message
        assert not started()

    def test_an_error_of_the_users_in_one_is_its_own_line(self, small_corpus: SmallCorpus) -> None:
        class Failing(MicroBatches):
            def __getitem__(self, key: tuple[int, int]) -> MicroBatch:
                raise UserError("shard 7 is gone")

        corpus, config = Corpus([small_corpus.train]), config_with("data.workers=1")
        failing = Failing(corpus, make_plan(corpus, config, seed=0), config, seed=0)
        with pytest.raises(UserError, match=r"^shard 7 is gone$"), loader_processes():
            next(failing.windows(range(3)))

    def test_an_error_of_the_program_keeps_its_traceback(self) -> None:
        with pytest.raises(RuntimeError, match=r"^a bug$"), loader_processes():
            raise RuntimeError("a bug")

    def test_their_memory_does_not_grow_over_two_thousand_micro_batches(
        self, small_corpus: SmallCorpus, started: Started
    ) -> None:
        config = config_with("data.workers=1", "data.max_seconds=1", "batch.max_seconds=1", "batch.micro_batches=1")
        stream = dataset_of(small_corpus.train, config).windows(range(2_500))
        resident = {}
        for update, _ in enumerate(stream, start=1):
            if update in (500, 2_500):
                (worker,) = started()
                pids = (os.getpid(), worker.pid)
                resident[update] = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        assert resident[2_500] < 1.02 * resident[500]


class TestPadding:
    def test_to_a_buckets_bound_gives_few_shapes(self, small_corpus: SmallCorpus) -> None:
        config = config_with("batch.pad_to=bucket", "batch.buckets=3")
        dataset = dataset_of(small_corpus.train, config)
        bounds = {bucket.longest for bucket in dataset.plan.buckets}
        widths = {dataset[0, number].inputs.waveforms_BS.shape[1] for number in range(3 * dataset.plan.per_epoch)}
        assert len(bounds) == len(dataset.plan.buckets) > 1
        assert widths == bounds
        batch = dataset[0, 0]
        assert batch.inputs.padded == bool((batch.inputs.lengths_B < batch.inputs.waveforms_BS.shape[1]).any())
        padded = sum(dataset[0, number].padded_samples for number in range(dataset.plan.per_epoch))
        audio = sum(dataset[0, number].audio_samples for number in range(dataset.plan.per_epoch))
        assert dataset.plan.padding() == pytest.approx(1 - audio / padded)

    def test_it_changes_no_loss(self, small_corpus: SmallCorpus) -> None:
        losses = []
        for pad_to in ("longest", "bucket"):
            config = config_with(f"batch.pad_to={pad_to}", "batch.buckets=2", "precision.compute=fp32")
            dataset = dataset_of(small_corpus.train, config)
            torch.manual_seed(0)
            model = Wav2Vec2ForPretraining(config.model, torch.float32).eval()
            criterion = PretrainingCriterion(config.model, seed=0)
            batches = [dataset[0, number] for number in range(4)]
            sums = [criterion(model, [batch], device=torch.device("cpu"), training=False) for batch in batches]
            losses.append([float(one.total) / float(one.masked) for one in sums])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class TestValidationBatches:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
    def test_ranks_get_equally_many_and_together_each_once(self, small_corpus: SmallCorpus, world_size: int) -> None:
        config = config_with("batch.max_seconds=4")
        dataset = dataset_of(small_corpus.validation, config)
        total = dataset.plan.per_epoch
        ranks = [
            list(validation_batches(dataset, config, rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        assert {len(batches) for batches in ranks} == {-(-total // world_size)}
        with_audio = [batch for batches in ranks for batch in batches if batch.utterances]
        assert sorted(batch.number for batch in with_audio) == list(range(total))
        assert sum(batch.utterances for batch in with_audio) == len(dataset.plan)
        empty = [batch for batches in ranks for batch in batches if not batch.utterances]
        assert all(batch.weight == 0 for batch in empty)

    def test_two_passes_are_the_same(self, small_corpus: SmallCorpus) -> None:
        config = config_with()
        dataset = dataset_of(small_corpus.validation, config)
        passes = [list(validation_batches(dataset, config)) for _ in range(2)]
        assert all(same(one, other) for one, other in zip(*passes, strict=True))


class TestCheckSample:
    def test_a_readable_corpus_passes(self, small_corpus: SmallCorpus) -> None:
        check_sample(Corpus([small_corpus.train]), sampling_rate=RATE)

    def test_one_readable_utterance_among_those_tried_is_enough(self, tmp_path: Path) -> None:
        paths = [write_audio(tmp_path / f"u{n}.wav", noise(1.0, seed=n)) for n in range(4)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
        for path in paths[:3]:
            path.unlink()
        check_sample(Corpus([manifest]), sampling_rate=RATE)

    def test_none_readable_is_an_error_that_names_the_first_and_what_to_do(self, tmp_path: Path) -> None:
        paths = [write_audio(tmp_path / f"u{n}.wav", noise(1.0, seed=n)) for n in range(30)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
        for path in paths:
            path.unlink()
        with pytest.raises(UserError) as caught:
            check_sample(Corpus([manifest]), sampling_rate=RATE)
        assert str(caught.value) == (
            f"{manifest}: none of 8 utterances tried can be read; the first: u0 ({paths[0]}): no such file; "
            f"look at the manifest with: w2vscale data validate {manifest}"
        )


class TestPlanOfARun:
    def test_utterances_too_short_to_be_masked_are_left_out_whatever_min_seconds(self, tmp_path: Path) -> None:
        model = config_with().model
        shortest = shortest_samples(model)
        paths = [
            write_audio(tmp_path / f"u{samples}.wav", noise(samples / RATE, seed=1))
            for samples in (shortest - 1, shortest, 32_000)
        ]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
        plan = make_plan(Corpus([manifest]), config_with("data.min_seconds=0.01"), seed=0)
        assert (len(plan), plan.left_out) == (2, 1)

    def test_crops_too_short_to_be_masked_are_an_error(self, small_corpus: SmallCorpus) -> None:
        config = config_with("data.max_seconds=0.2", "data.min_seconds=0.1")
        with pytest.raises(UserError, match=r"data.max_seconds=0.2: too short to be masked; set at least 0.2\d+$"):
            make_plan(Corpus([small_corpus.train]), config, seed=0)

    def test_crops_longer_than_the_model_takes_are_an_error(self, small_corpus: SmallCorpus) -> None:
        config = load_config("base_prenorm", ["data.max_seconds=25"])
        with pytest.raises(UserError, match=r"data.max_seconds=25: gives 1250 frames.* model.max_frames=1024"):
            make_plan(Corpus([small_corpus.train]), config, seed=0)

    def test_a_corpus_of_too_short_utterances_is_an_error_that_names_it(self, small_corpus: SmallCorpus) -> None:
        config = config_with("data.max_seconds=9", "data.min_seconds=8")
        with pytest.raises(UserError, match=r"cuts_train.jsonl: .*data.min_seconds"):
            make_plan(Corpus([small_corpus.train]), config, seed=0)
