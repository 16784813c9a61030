"""The DataLoader around micro-batches: windows of ranks, loader processes, validation, and the plan of a run."""

from __future__ import annotations

import multiprocessing.connection
import os
import re
import time
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch

from tests.helpers.audio import SmallCorpus, cut_of, noise, write_audio, write_manifest
from tests.helpers.batches import config_with, dataset_of, plan_of, same, windows_of
from tests.helpers.processes import Started
from w2vscale.config import load_config
from w2vscale.data.assembly import Assembler
from w2vscale.data.indexed import MicroBatches, check_sample, validation_set
from w2vscale.data.loading import (
    Loader,
    _deaths_ignored,
    _prepare_loader_process,
    end_loader_processes,
    loader_processes,
)
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.plan import rank_window
from w2vscale.errors import TemporaryError, UserError
from w2vscale.models.lengths import input_samples
from w2vscale.objectives import build_objective
from w2vscale.runtime import Interrupted

RATE = 16_000


class TestWindows:
    def test_workers_change_nothing(self, small_corpus: SmallCorpus) -> None:
        found = []
        for workers in (0, 2):
            config = config_with(f"data.workers={workers}", "data.prefetch=1")
            dataset = dataset_of(small_corpus.train, config)
            found.append([batch for window in windows_of(dataset, range(2, 6)) for batch in window])
        assert len(found[0]) == 8
        assert all(same(one, other) for one, other in zip(*found, strict=True))

    def test_each_rank_gets_its_part_of_every_update(self, small_corpus: SmallCorpus) -> None:
        config = config_with("batch.micro_batches=4")
        dataset = dataset_of(small_corpus.train, config)
        for rank in (0, 1):
            found = windows_of(dataset, range(3, 5), micro_batches=4, rank=rank, world_size=2)
            assert [[batch.number for batch in window] for window in found] == [
                rank_window(dataset.plan, update, micro_batches=4, rank=rank, world_size=2) for update in (3, 4)
            ]

    def test_a_resumed_run_gets_the_windows_of_an_uninterrupted_one(self, small_corpus: SmallCorpus) -> None:
        config = config_with()
        dataset = dataset_of(small_corpus.train, config)
        whole = list(windows_of(dataset, range(6)))
        late = list(windows_of(dataset_of(small_corpus.train, config), range(4, 6)))
        pairs = [pair for now, then in zip(late, whole[4:], strict=True) for pair in zip(now, then, strict=True)]
        assert all(same(one, other) for one, other in pairs)

    def test_no_updates_load_nothing(self, small_corpus: SmallCorpus) -> None:
        assert list(windows_of(dataset_of(small_corpus.train, config_with()), range(0))) == []


def test_manifests_of_equal_size_and_other_content_are_distinguished(tmp_path: Path) -> None:
    described = []
    for folder, name in (("one", "a"), ("copy", "a"), ("other", "b")):
        cuts = [cut_of(write_audio(tmp_path / f"{n}.wav", noise(2.0, seed=n)), identifier=f"{name}{n}") for n in (1, 2)]
        (tmp_path / folder).mkdir()
        manifest = write_manifest(tmp_path / folder / "cuts.jsonl", cuts)
        described.append(dataset_of(manifest, config_with()).describe())
    assert described[0] == described[1] != described[2]


class TestLoaderProcesses:
    def test_a_killed_process_is_reported_in_one_line_and_the_others_end(
        self, small_corpus: SmallCorpus, started: Started
    ) -> None:
        config = config_with("data.workers=2", "data.prefetch=1")

        def read_until_one_dies() -> None:
            with loader_processes():
                for update, _ in enumerate(windows_of(dataset_of(small_corpus.train, config), range(100_000))):
                    if update == 2:
                        started()[0].kill()

        with pytest.raises(UserError) as caught:
            read_until_one_dies()
        message = str(caught.value)
        assert re.match(r"a loader process was killed or died( \(Killed\))?, .*data\.workers", message), message
        assert "\n" not in message
        assert not started()

    def test_a_user_error_in_a_process_keeps_its_own_line(self, small_corpus: SmallCorpus) -> None:
        class Failing(MicroBatches):
            def __getitem__(self, number: int) -> MicroBatch:
                raise UserError("shard 7 is gone")

        corpus, config = Corpus([small_corpus.train]), config_with("data.workers=1")
        assemble = Assembler(build_objective(config), config.model, seed=0)
        failing = Failing(corpus, plan_of(corpus, config), assemble, config.data)
        with pytest.raises(UserError, match=r"^shard 7 is gone$"), loader_processes():
            next(windows_of(failing, range(3)))

    def test_a_trainer_that_stops_while_it_takes_a_tensor_leaves_no_traceback(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def hand_over(queue: Any) -> None:
            _prepare_loader_process(0)
            for number in range(3):
                queue.put(torch.full((100,), number))
            time.sleep(60)

        def interrupted(*arguments: object) -> None:
            raise Interrupted

        processes = torch.multiprocessing.get_context("fork")
        with loader_processes():
            queue = processes.Queue()
            processes.Process(target=hand_over, args=(queue,)).start()
            for step in ("answer_challenge", "deliver_challenge"):
                with monkeypatch.context() as patch:
                    patch.setattr(multiprocessing.connection, step, interrupted)
                    with pytest.raises(Interrupted):
                        queue.get(timeout=30)
            assert torch.equal(queue.get(timeout=30), torch.full((100,), 2))  # so it was done with the other two
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize(
        "error", [RuntimeError("received 0 items of ancdata"), SystemError(), EOFError(), BrokenPipeError(32, "broken")]
    )
    def test_any_error_that_a_death_causes_is_the_same_line(
        self, small_corpus: SmallCorpus, started: Started, error: Exception
    ) -> None:
        """It may be raised a moment before the process has ended."""
        dataset = dataset_of(small_corpus.train, config_with("data.workers=1"))

        def fail(*, kill: bool) -> None:
            with loader_processes():
                next(windows := windows_of(dataset, range(100_000)))
                with _deaths_ignored():
                    if kill:
                        Timer(0.1, started()[0].kill).start()
                    raise error
                next(windows)  # so its processes are still in use

        with pytest.raises(type(error)):
            fail(kill=False)
        with pytest.raises(TemporaryError, match=r"^a loader process was killed or died \(Killed\), often"):
            fail(kill=True)
        assert not started()

    def test_processes_that_the_trainer_has_ended_are_not_the_cause_of_a_later_error(
        self, small_corpus: SmallCorpus, started: Started
    ) -> None:
        dataset = dataset_of(small_corpus.train, config_with("data.workers=1"))

        def fail() -> None:
            with loader_processes():
                next(windows := windows_of(dataset, range(100_000)))
                assert started()
                end_loader_processes()
                assert not started()
                raise RuntimeError("a bug")
                next(windows)  # so its processes are still in use

        with pytest.raises(RuntimeError, match=r"^a bug$"):
            fail()

    def test_a_death_that_another_rank_has_noticed_is_the_same_line(self) -> None:
        """When ranks save together, all raise the error of one."""
        passed_on = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        expected = pytest.raises(TemporaryError, match=r"^a loader process was killed or died \(of another rank\)")
        with expected, loader_processes():
            raise passed_on

    def test_other_errors_keep_their_traceback(self) -> None:
        with pytest.raises(RuntimeError, match=r"^a bug$"), loader_processes():
            raise RuntimeError("a bug")

    @pytest.mark.long
    def test_memory_does_not_grow_over_two_thousand_micro_batches(
        self, small_corpus: SmallCorpus, started: Started
    ) -> None:
        config = config_with("data.workers=1", "data.max_seconds=1", "batch.max_seconds=1", "batch.micro_batches=1")
        stream = windows_of(dataset_of(small_corpus.train, config), range(2_500), micro_batches=1)
        resident = {}
        for update, _ in enumerate(stream, start=1):
            if update in (500, 2_500):
                (worker,) = started()
                pids = (os.getpid(), worker.pid)
                resident[update] = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        assert resident[2_500] < 1.02 * resident[500]


class TestOneEpoch:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
    def test_ranks_get_equal_counts_and_together_each_one_once(
        self, small_corpus: SmallCorpus, world_size: int
    ) -> None:
        config = config_with("batch.max_seconds=4")
        dataset = dataset_of(small_corpus.validation, config)
        total = dataset.plan.per_epoch
        ranks = [list(dataset.one_epoch(rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {-(-total // world_size)}
        with_audio = [batch for batches in ranks for batch in batches if batch.utterances]
        assert sorted(batch.number for batch in with_audio) == list(range(total))
        assert sum(batch.utterances for batch in with_audio) == len(dataset.plan)
        empty = [batch for batches in ranks for batch in batches if not batch.utterances]
        assert all(batch.weight == 0 for batch in empty)

    def test_two_passes_are_the_same(self, small_corpus: SmallCorpus) -> None:
        dataset = dataset_of(small_corpus.validation, config_with())
        passes = [list(dataset.one_epoch()) for _ in range(2)]
        assert all(same(one, other) for one, other in zip(*passes, strict=True))


class TestCheckSample:
    def test_a_readable_corpus_passes(self, small_corpus: SmallCorpus) -> None:
        check_sample(Corpus([small_corpus.train]), sampling_rate=RATE)

    def test_one_readable_utterance_in_the_sample_is_enough(self, tmp_path: Path) -> None:
        paths = [write_audio(tmp_path / f"u{n}.wav", noise(1.0, seed=n)) for n in range(4)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
        for path in paths[:3]:
            path.unlink()
        check_sample(Corpus([manifest]), sampling_rate=RATE)

    def test_without_a_readable_utterance_the_error_names_the_first_and_says_what_to_do(self, tmp_path: Path) -> None:
        paths = [write_audio(tmp_path / f"u{n}.wav", noise(1.0, seed=n)) for n in range(30)]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
        for path in paths:
            path.unlink()
        with pytest.raises(UserError) as caught:
            check_sample(Corpus([manifest]), sampling_rate=RATE)
        assert str(caught.value) == (
            f"{manifest}: none of 8 sampled utterances can be read; the first: u0 ({paths[0]}): no such file; "
            f"check the manifest with: w2vscale data validate {manifest}"
        )


@pytest.mark.parametrize(("workers", "per_rank", "ahead"), [(2, 1, 4), (2, 16, 8), (3, 16, 6), (2, 4, 4)])
def test_each_process_prepares_its_share_of_a_window(
    small_corpus: SmallCorpus, workers: int, per_rank: int, ahead: int
) -> None:
    """`data.prefetch` micro-batches or more."""
    config = config_with(f"data.workers={workers}", "data.prefetch=4")
    loader = Loader(dataset_of(small_corpus.train, config), config.data, per_rank=per_rank)
    assert loader.prefetch_factor == ahead


class TestPlanOfARun:
    @pytest.mark.parametrize(
        ("micro_batches", "same_bucket", "series"), [(16, 4, 4), (12, 5, 3), (12, 1, 1), (2, 8, 1)]
    )
    def test_whole_series_make_an_update(
        self, small_corpus: SmallCorpus, micro_batches: int, same_bucket: int, series: int
    ) -> None:
        settings = ("data.max_seconds=1", "batch.max_seconds=2", f"batch.micro_batches={micro_batches}")
        config = config_with(*settings, f"batch.same_bucket={same_bucket}")
        assert dataset_of(small_corpus.train, config).series_length == series

    def test_validation_has_no_series(self, small_corpus: SmallCorpus) -> None:
        config = config_with("data.max_seconds=1", "batch.max_seconds=2", "batch.same_bucket=2")
        sections = {"model": config.model, "data": config.data, "batch": config.batch}
        assert validation_set(Corpus([small_corpus.train]), build_objective(config), **sections).series_length == 1

    def test_utterances_too_short_for_the_objective_are_left_out_whatever_min_seconds(self, tmp_path: Path) -> None:
        config = config_with("data.min_seconds=0.01")
        shortest = input_samples(build_objective(config).shortest_frames, config.model)
        paths = [
            write_audio(tmp_path / f"u{samples}.wav", noise(samples / RATE, seed=1))
            for samples in (shortest - 1, shortest, 32_000)
        ]
        manifest = write_manifest(tmp_path / "cuts.jsonl", [cut_of(path) for path in paths])
        plan = plan_of(Corpus([manifest]), config)
        assert (len(plan), plan.left_out) == (2, 1)

    def test_crops_too_short_for_the_objective_are_an_error(self, small_corpus: SmallCorpus) -> None:
        config = config_with("data.max_seconds=0.06", "data.min_seconds=0.05")
        with pytest.raises(UserError, match=r"data.max_seconds=0.06: shorter than 3 frames, .*; set at least 0.065$"):
            plan_of(Corpus([small_corpus.train]), config)

    def test_crops_too_long_for_the_model_are_an_error(self, small_corpus: SmallCorpus) -> None:
        config = load_config("base_prenorm", ["data.max_seconds=25"])
        with pytest.raises(UserError, match=r"data.max_seconds=25: gives 1250 frames.* model.max_frames=1024"):
            plan_of(Corpus([small_corpus.train]), config)

    def test_a_corpus_without_long_enough_utterances_is_an_error_that_names_it(self, small_corpus: SmallCorpus) -> None:
        config = config_with("data.max_seconds=9", "data.min_seconds=8")
        with pytest.raises(UserError, match=r"cuts_train.jsonl: .*data.min_seconds"):
            plan_of(Corpus([small_corpus.train]), config)
