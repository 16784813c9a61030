"""Micro-batches: audio, masks and sizes are those of the plan, and bad audio changes nothing else."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest, write_text
from tests.helpers.batches import config_with, dataset_of, inputs_of, same, utterance_of_masked_frames
from w2vscale.config import load_config
from w2vscale.data.audio import read_audio
from w2vscale.data.micro_batch import BadAudio
from w2vscale.models.lengths import input_samples
from w2vscale.objectives import StepContext, build_objective
from w2vscale.objectives.contrastive import ContrastiveInputs

RATE = 16_000


class TestMicroBatches:
    def write(self, folder: Path, count: int = 9) -> tuple[Path, list[Path]]:
        folder.mkdir()
        paths = [write_audio(folder / f"u{n}.wav", noise(1.5 + 0.3 * n, seed=n)) for n in range(count)]
        return write_manifest(folder / "cuts.jsonl", [cut_of(path) for path in paths]), paths

    def test_audio_masks_and_sizes_are_those_of_the_plan(self, small_corpus: SmallCorpus) -> None:
        config = config_with()
        dataset = dataset_of(small_corpus.train, config)
        for number in (0, 3, dataset.plan.per_epoch + 1):
            planned, batch = dataset.plan.micro_batch(number), dataset[number]
            audio = batch.inputs.audio
            assert (batch.number, batch.bad) == (number, ())
            assert audio.lengths_B.tolist() == list(audio.samples) == planned.lengths.tolist()
            assert batch.utterances == planned.utterances.size
            assert batch.audio_samples == planned.lengths.sum()
            assert batch.padded_samples == planned.utterances.size * planned.longest
            assert batch.padded_samples <= config.batch.max_seconds * RATE
            for row, (utterance, offset, length) in enumerate(
                zip(planned.utterances, planned.offsets, planned.lengths, strict=True)
            ):
                cut = dataset.corpus.cut(int(utterance))
                expected = read_audio(cut, sampling_rate=RATE, offset=int(offset), length=int(length), normalize=False)
                assert np.array_equal(audio.waveforms_BS[row, :length].numpy(), expected)
                assert not audio.waveforms_BS[row, length:].any()
                assert audio.mask_BT[row].any()
                assert not audio.mask_BT[row, audio.frames_B[row] :].any()

    def test_lists_of_masked_frames_agree_with_the_mask(self, small_corpus: SmallCorpus) -> None:
        config = config_with()
        batch = dataset_of(small_corpus.train, config)[1]
        inputs, mask_BT = batch.inputs, batch.inputs.audio.mask_BT
        utterance_M = utterance_of_masked_frames(inputs)
        assert mask_BT.nonzero().tolist() == torch.stack([utterance_M, inputs.frame_M], dim=1).tolist()
        assert batch.weight == batch.masked_frames == int(mask_BT.sum()) == sum(inputs.masked)
        assert inputs.masked_B.tolist() == list(inputs.masked)
        for row in range(batch.utterances):
            mine = utterance_M == row
            assert inputs.slot_M[mine].tolist() == list(range(int(mine.sum())))
            assert (inputs.negatives_MK[mine] < mine.sum()).all()
        assert (inputs.negatives_MK != inputs.slot_M[:, None]).all()
        assert inputs.negatives_MK.shape == (batch.weight, build_objective(config).settings.negatives)

    def test_a_bad_utterance_is_reported_and_changes_no_other(self, tmp_path: Path) -> None:
        config = config_with("batch.max_seconds=16")
        manifest, paths = self.write(tmp_path / "corpus")
        whole = dataset_of(manifest, config)
        number = next(n for n in range(whole.plan.per_epoch) if whole.plan.micro_batch(n).utterances.size >= 4)
        before = whole[number]
        gone = int(whole.plan.micro_batch(number).utterances[1])
        write_text(paths[gone])
        after = whole[number]
        assert after.bad == (
            BadAudio(f"u{gone}", str(paths[gone]), "undecodable", "not readable as audio: Format not recognised"),
        )
        assert after.utterances == before.utterances - 1
        rows = [row for row in range(before.utterances) if row != 1]
        for new, old in enumerate(rows):
            now, then = after.inputs.audio, before.inputs.audio
            samples, frames = int(then.lengths_B[old]), int(then.frames_B[old])
            assert torch.equal(now.waveforms_BS[new, :samples], then.waveforms_BS[old, :samples])
            assert torch.equal(now.mask_BT[new, :frames], then.mask_BT[old, :frames])
            mine = utterance_of_masked_frames(after.inputs) == new
            theirs = utterance_of_masked_frames(before.inputs) == old
            assert torch.equal(after.inputs.negatives_MK[mine], before.inputs.negatives_MK[theirs])

    def test_without_a_usable_utterance_it_is_silence_without_weight(self, tmp_path: Path) -> None:
        config = config_with()
        manifest, paths = self.write(tmp_path / "corpus", count=3)
        dataset = dataset_of(manifest, config)
        for path in paths:
            path.unlink()
        batch, objective = dataset[0], build_objective(config)
        assert len(batch.bad) == dataset.plan.micro_batch(0).utterances.size
        assert (batch.weight, batch.audio_samples, batch.utterances) == (0, 0, 0)
        audio = batch.inputs.audio
        assert audio.waveforms_BS.shape == (1, input_samples(objective.shortest_frames, config.model))
        assert not audio.waveforms_BS.any() and not audio.mask_BT.any()
        assert batch.inputs.negatives_MK.shape == (0, objective.settings.negatives)

    def test_a_manifest_that_changes_during_a_run_costs_utterances_but_not_the_run(self, tmp_path: Path) -> None:
        manifest, _ = self.write(tmp_path / "corpus", count=3)
        dataset = dataset_of(manifest, config_with())
        manifest.write_bytes(b"x" * manifest.stat().st_size)
        batch = dataset[0]
        assert batch.utterances == 0
        assert all(str(manifest) in bad.reason for bad in batch.bad)

    def test_a_pickled_dataset_gives_the_same_micro_batches(self, small_corpus: SmallCorpus) -> None:
        dataset = dataset_of(small_corpus.train, config_with())
        expected = dataset[2]
        assert same(pickle.loads(pickle.dumps(dataset))[2], expected)


class TestDraws:
    def inputs(
        self, lengths: Sequence[int], *, places: Sequence[int] | None = None, number: int = 3, seed: int = 1
    ) -> ContrastiveInputs:
        audio = [np.ones(length, np.float32) for length in lengths]
        inputs: ContrastiveInputs = inputs_of(
            build_objective(config_with()), audio, places=places, number=number, seed=seed
        )
        return inputs

    def draws(self, inputs: ContrastiveInputs, row: int) -> tuple[list[bool], list[list[int]]]:
        frames = int(inputs.audio.frames_B[row])
        mine = utterance_of_masked_frames(inputs) == row
        return inputs.audio.mask_BT[row, :frames].tolist(), inputs.negatives_MK[mine].tolist()

    def test_the_masks_of_an_utterance_do_not_depend_on_the_others(self) -> None:
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
            config = load_config(preset)
            objective = build_objective(config)
            audio = np.ones(input_samples(objective.shortest_frames, config.model), np.float32)
            inputs = inputs_of(objective, [audio])
            assert inputs.masked[0] >= objective.settings.mask_min_spans
            assert (inputs.negatives_MK != inputs.slot_M[:, None]).all()


class TestPadding:
    def test_padding_to_the_bucket_gives_few_shapes(self, small_corpus: SmallCorpus) -> None:
        config = config_with("batch.pad_to=bucket", "batch.buckets=3")
        dataset = dataset_of(small_corpus.train, config)
        bounds = {bucket.longest for bucket in dataset.plan.buckets}
        widths = {dataset[number].inputs.audio.waveforms_BS.shape[1] for number in range(3 * dataset.plan.per_epoch)}
        assert len(bounds) == len(dataset.plan.buckets) > 1
        assert widths == bounds
        batch = dataset[0].inputs.audio
        assert batch.padded == bool((batch.lengths_B < batch.waveforms_BS.shape[1]).any())
        padded = sum(dataset[number].padded_samples for number in range(dataset.plan.per_epoch))
        audio = sum(dataset[number].audio_samples for number in range(dataset.plan.per_epoch))
        assert dataset.plan.padding() == pytest.approx(1 - audio / padded)

    def test_it_changes_no_loss(self, small_corpus: SmallCorpus) -> None:
        losses = []
        for pad_to in ("longest", "bucket"):
            config = config_with(f"batch.pad_to={pad_to}", "batch.buckets=2", "precision.compute=fp32")
            dataset = dataset_of(small_corpus.train, config)
            torch.manual_seed(0)
            objective = build_objective(config)
            model = objective.build_model().eval()
            with torch.no_grad():
                sums = [
                    objective.forward(model, dataset[number].inputs, step=StepContext(seed=0, update=0), training=False)
                    for number in range(4)
                ]
            losses.append([objective.metrics(one)["loss"] for one in sums])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
