"""Process-wide state: set by commands only, for as long as they run. Library calls leave a process as it was."""

from __future__ import annotations

import gc
import json
import multiprocessing
import multiprocessing.util
import os
import platform
import signal
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tests.helpers.audio import SmallCorpus
from tests.helpers.micro import MICRO_RUN
from w2vscale import runtime
from w2vscale.data.loading import _prepare_loader_process
from w2vscale.runtime import NEVER, STOP_SIGNALS, StopRequest, collected_between_steps

ROOT = Path(__file__).resolve().parents[1]

LIBRARY = """
import gc, json, logging, os, signal, sys, threading, warnings

def state():
    import torch
    from torch._dynamo import config
    return {
        "thresholds of the garbage collector": gc.get_threshold(),
        "frozen objects": gc.get_freeze_count(),
        "garbage collection": gc.isenabled(),
        "warning filters": [str(each) for each in warnings.filters],
        "environment": dict(os.environ),
        "arguments": sys.argv,
        "handlers of the root logger": [str(each) for each in logging.root.handlers],
        "level of the root logger": logging.root.level,
        "signal handlers": {number: str(signal.getsignal(number)) for number in sorted(signal.valid_signals())},
        "excepthook": str(sys.excepthook),
        "threads of torch": torch.get_num_threads(),
        "default type of torch": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "cuDNN attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "dynamo": [config.recompile_limit, config.optimize_ddp],
    }

# Libraries that w2vscale builds on may change state when they are imported; w2vscale may not.
import numpy, torch, torch.distributed.checkpoint, torch.distributed.fsdp, torch.utils.tensorboard
list(torch.utils.data.DataLoader([1], num_workers=1))  # installs PyTorch's own handler of SIGCHLD
import torch._dynamo, lhotse, lhotse.shar, lhotse.dataset, pydantic, rich.progress, soundfile, yaml
before = state()
collections, collect = [], gc.collect
def collect_and_count():
    collections.append(sys._getframe(1).f_globals["__name__"])
    return collect()
gc.collect = collect_and_count
import w2vscale
from pathlib import Path
from w2vscale.config import load_config
from w2vscale.evaluation.validation import evaluate_checkpoint
from w2vscale.runtime import collected_between_steps
from w2vscale.training.train import train
exp, corpus, *overrides = sys.argv[1:]
config = load_config("base", [*overrides, f"data.train={corpus}", f"data.validation={corpus}"])
assert train(config, Path(exp)) == 0
trained = state()
evaluate_checkpoint(Path(exp), [Path(corpus)])
w2vscale.load(exp).features(numpy.random.default_rng(0).standard_normal(16_000) * 0.1, 16_000)
used = state()
by_library = collections.count("w2vscale.training.loop")
assert train(config, Path(exp + "2"), around_updates=collected_between_steps) == 0
print(json.dumps([before, trained, used, by_library, collections.count("w2vscale.training.loop")]))
"""


def test_library_calls_leave_the_process_as_it_was(small_corpus: SmallCorpus, tmp_path: Path) -> None:
    settings = [*MICRO_RUN, "trainer.updates=2", "schedule.warmup_updates=1", "data.workers=1"]
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(tmp_path / "exp"), str(small_corpus.train), *settings],
        capture_output=True, text=True, timeout=240, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, trained, used, by_library, between_steps = json.loads(done.stdout.splitlines()[-1])
    for after in (trained, used):
        assert {name: (before[name], after[name]) for name in before if before[name] != after[name]} == {}
    # Existing objects make a full collection slow, so the loop asks for one only where they are left out.
    assert (by_library, between_steps) == (0, 2)


class TestTraining:
    """What `w2vscale train` sets up."""

    def test_signal_handlers_are_those_of_before_afterwards(self) -> None:
        before = [signal.getsignal(number) for number in STOP_SIGNALS]
        with runtime.training() as stop:
            # What is ignored, as SIGHUP under nohup, stays ignored.
            expected = [handler if handler == signal.SIG_IGN else stop._handle for handler in before]
            assert [signal.getsignal(number) for number in STOP_SIGNALS] == expected
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before

    def test_compiled_blocks_may_have_many_variants(self) -> None:
        from torch._dynamo import config

        before = {"recompile_limit": config.recompile_limit, "optimize_ddp": config.optimize_ddp}
        with config.patch(before):  # monkeypatch would delete what it set: pytest looks into the module's __dict__
            with runtime.training():
                assert (config.recompile_limit, config.optimize_ddp) != (runtime.COMPILED_VARIANTS, False)
            with runtime.training(compile=True):
                assert (config.recompile_limit, config.optimize_ddp) == (runtime.COMPILED_VARIANTS, False)
        assert before == {"recompile_limit": config.recompile_limit, "optimize_ddp": config.optimize_ddp}

    @pytest.mark.cuda
    def test_cudnn_attention_is_off_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        enabled = torch.backends.cuda.cudnn_sdp_enabled()
        try:
            with runtime.training():
                assert not torch.backends.cuda.cudnn_sdp_enabled()
        finally:
            torch.backends.cuda.enable_cudnn_sdp(enabled)


class TestStopRequest:
    def test_the_first_signal_is_remembered_and_a_second_one_later_ends_the_process(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with StopRequest() as stop:
            assert stop.received is None
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # one request with the first
            assert stop.received is signal.SIGTERM
            monkeypatch.setattr(runtime, "ONE_REQUEST_SECONDS", -1.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)

    def test_ignored_signals_stay_ignored(self) -> None:
        previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopRequest():
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, previous)


class Cycle:
    """Refers to itself, so that only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def _send_thresholds(connection: Connection) -> None:
    _prepare_loader_process(0)
    connection.send(gc.get_threshold())


class TestGarbageCollection:
    def test_existing_objects_are_not_looked_through_and_new_ones_are(self) -> None:
        thresholds = gc.get_threshold()
        older = Cycle()
        with collected_between_steps():
            assert gc.get_freeze_count() > 1000 and gc.get_threshold() == (*thresholds[:2], NEVER)
            lasting, gone = weakref.ref(older), weakref.ref(Cycle())
            del older
            gc.collect()
            assert gone() is None and lasting() is not None
        assert gc.get_threshold() == thresholds and gc.get_freeze_count() == 0
        gc.collect()
        assert lasting() is None

    def test_loader_processes_have_the_usual_thresholds(self) -> None:
        thresholds = gc.get_threshold()
        ours, theirs = multiprocessing.Pipe()
        with collected_between_steps():
            process = multiprocessing.get_context("fork").Process(target=_send_thresholds, args=(theirs,))
            process.start()
            assert ours.poll(30) and ours.recv() == thresholds
            process.join()


class TestMemory:
    """Freed memory is kept for the next tensor, unless the user has set variables of the C library."""

    SCRIPT = """
import resource, torch
from w2vscale.runtime import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 << 20)  # 40 MB; glibc returns freed memory from 32 MB on
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(30)))
"""
    FOREIGN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")

    def faults(self, **environment: str) -> list[int]:
        """Page faults of thirty tensors, one after another. A small object behind a freed tensor may cost the next
        few, which need some room for their alignment, their place."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(self.FOREIGN)}
        own |= {"THP_MEM_ALLOC_ENABLE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", self.SCRIPT],
            env=own | environment, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT,
        )  # fmt: skip
        return [int(number) for number in done.stdout.split()]

    @pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
    def test_large_tensors_use_freed_memory_again(self) -> None:
        first, *later = self.faults()
        keeping = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        if min(later) > first / 10 and min(kept := self.faults(**keeping)) > 50:
            pytest.skip(f"the variables of glibc do not keep memory here either: {kept} page faults")
        assert first > 50 and min(later) < first / 10
        assert min(self.faults(MALLOC_ARENA_MAX="2")) > 50


class TestStopSignals:
    def test_waiting_is_interrupted(self) -> None:
        with StopRequest() as stop:
            with pytest.raises(runtime.Interrupted), stop.interrupting():
                os.kill(os.getpid(), signal.SIGUSR1)  # the handler runs before the next line
            assert stop.received == signal.SIGUSR1
            with pytest.raises(runtime.Interrupted), stop.interrupting():  # it has come before
                raise AssertionError("the block must not begin")

    def test_other_work_is_not_interrupted(self) -> None:
        with StopRequest() as stop:
            with stop.interrupting():
                pass
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.received == signal.SIGUSR1

    def test_another_thread_sees_it_while_the_main_thread_is_busy(self) -> None:
        """The handler in Python runs late, as it does while the main thread waits for other ranks."""
        with StopRequest() as stop:
            assert stop.arrived() is None
            held = signal.pthread_sigmask(signal.SIG_SETMASK, [])
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            found = stop.arrived()
            assert found is not None and found[0] == signal.SIGTERM
            assert stop.arrived() == found


class TestSockets:
    """The folder for the sockets of loader processes."""

    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(runtime, "_place_of_sockets", lambda: tmp_path)
        monkeypatch.delitem(multiprocessing.process.current_process()._config, "tempdir", raising=False)
        return tmp_path

    def test_it_is_used_and_deleted(self, place: Path) -> None:
        with runtime.socket_folder():
            (folder,) = place.iterdir()
            assert multiprocessing.util.get_temp_dir() == str(folder)
        assert not [*place.iterdir()]

    def test_that_of_a_killed_process_is_deleted_and_that_of_a_running_one_is_not(self, place: Path) -> None:
        context = multiprocessing.get_context("fork")
        held = context.Event()
        processes = [context.Process(target=_hold_sockets, args=(held,)) for _ in range(2)]
        for process in processes:
            held.clear()
            process.start()
            assert held.wait(30)
        (place / "w2vscale-other").symlink_to("/nowhere")
        assert len([*place.iterdir()]) == 3
        processes[0].kill()
        processes[0].join()
        runtime.delete_left_sockets()
        assert len([*place.iterdir()]) == 2
        processes[1].kill()
        processes[1].join()
        with runtime.socket_folder():
            assert len([*place.iterdir()]) == 2
        (place / "w2vscale-other").unlink()


def _hold_sockets(held: object) -> None:
    with runtime.socket_folder():
        held.set()  # type: ignore[attr-defined]
        signal.pause()
