"""Which micro-batches share a forward, and how much memory is measured to be in use."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import load_config
from w2vscale.data.micro_batch import MicroBatch, make_inputs
from w2vscale.engine import memory
from w2vscale.engine.compilation import compile_blocks
from w2vscale.engine.joining import Capacity, FittingJoining, FixedJoining, joining
from w2vscale.engine.memory import memory_limit, peak_memory
from w2vscale.errors import UserError
from w2vscale.training.run import empty_model

MODEL = load_config("base", list(MICRO_MODEL)).model


def micro_batches(*shapes: tuple[int, int]) -> list[MicroBatch]:
    found = []
    for number, (rows, width) in enumerate(shapes):
        silence = [np.zeros(width, dtype=np.float32)] * rows
        inputs = make_inputs(silence, range(rows), number=number, seed=0, config=MODEL)
        found.append(MicroBatch(0, number, inputs, rows * width))
    return found


def numbers(chunks: list) -> list[list[int]]:
    return [[batch.number for batch in chunk] for chunk in chunks]


def test_a_fixed_number() -> None:
    window = micro_batches(*[(1, 8000)] * 5)
    assert numbers(FixedJoining(2).chunks(window)) == [[0, 1], [2, 3], [4]]
    assert joining(3) == FixedJoining(3) and joining("auto") == FixedJoining(1)


class TestFitting:
    def test_as_many_as_fit(self) -> None:
        window = micro_batches(*[(2, 8000)] * 7)
        assert numbers(FittingJoining((Capacity(8000, 50_000),)).chunks(window)) == [[0, 1, 2], [3, 4, 5], [6]]

    def test_what_is_larger_than_that_runs_alone(self) -> None:
        window = micro_batches((2, 8000), (1, 8000), (1, 8000))
        assert numbers(FittingJoining((Capacity(8000, 9000),)).chunks(window)) == [[0], [1], [2]]

    def test_what_would_add_padding_is_left_apart(self) -> None:
        window = micro_batches((2, 12_000), (2, 11_900), (4, 6000), (4, 5990))
        assert numbers(FittingJoining((Capacity(12_000, 10**6),)).chunks(window)) == [[0, 1], [2, 3]]

    def test_the_capacity_is_that_of_the_next_longer_utterances(self) -> None:
        rule = FittingJoining((Capacity(12_000, 24_000), Capacity(8000, 32_000), Capacity(6000, 36_000)))
        assert numbers(rule.chunks(micro_batches(*[(1, 12_000)] * 3))) == [[0, 1], [2]]
        assert numbers(rule.chunks(micro_batches(*[(1, 8000)] * 5))) == [[0, 1, 2, 3], [4]]
        assert numbers(rule.chunks(micro_batches(*[(1, 7000)] * 5))) == [[0, 1, 2, 3], [4]]
        assert numbers(rule.chunks(micro_batches(*[(1, 5900)] * 8))) == [[0, 1, 2, 3, 4, 5], [6, 7]]
        # Longer than any that was measured.
        assert numbers(rule.chunks(micro_batches(*[(1, 13_000)] * 2))) == [[0], [1]]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells how much memory is used")
class TestMemory:
    def test_the_peak_is_that_of_the_work_alone(self) -> None:
        device = torch.device("cpu")
        small, large, again = (
            peak_memory(device, lambda count=count: torch.ones(count << 18).sum()) for count in (64, 512, 64)
        )
        assert large - small == pytest.approx(448 << 20, rel=0.2)
        assert abs(again - small) < 64 << 20

    def test_the_limit_is_shared(self) -> None:
        alone, shared = (memory_limit(torch.device("cpu"), processes=count) for count in (1, 4))
        total = int(ctypes.CDLL(None).sysconf(85)) * 4096  # _SC_PHYS_PAGES
        assert shared < alone < 2 * total

    @pytest.mark.parametrize(
        ("lines", "files", "left"),
        [
            (("0::/",), {}, 100),
            (("0::/",), {"memory.max": "60", "memory.current": "50", "memory.stat": "inactive_file 20"}, 30),
            (
                ("0::/job/step",),
                {"job/memory.max": "70", "job/memory.current": "10", "job/step/memory.max": "max"},
                60,
            ),
            (
                ("9:cpu:/job", "4:memory:/job"),
                {
                    "memory/job/memory.limit_in_bytes": "50",
                    "memory/job/memory.usage_in_bytes": "40",
                    "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 7",
                    "memory/memory.limit_in_bytes": str(2**63 - 4096),
                    "memory/memory.usage_in_bytes": "80",
                },
                17,
            ),
        ],
        ids=["no limit", "container", "job", "version 1"],
    )
    def test_control_groups_are_limits(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        lines: tuple[str, ...],
        files: dict[str, str],
        left: int,
    ) -> None:
        """Amounts in units of 1024 bytes."""
        written = {
            f"groups/{name}": re.sub(r"\d+$", lambda found: str(int(found[0]) * 1024), text, flags=re.MULTILINE)
            for name, text in files.items()
        }
        written |= {"self/cgroup": "\n".join(lines), "self/status": "VmRSS: 5 kB", "meminfo": "MemAvailable: 100 kB"}
        for name, text in written.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        for name, path in (("PROCESS", "self"), ("CONTROL_GROUPS", "groups"), ("MEMORY", "meminfo")):
            monkeypatch.setattr(memory, name, tmp_path / path)
        assert memory_limit(torch.device("cpu"), processes=2) == left * 512 + 5 * 1024

    def test_a_system_that_does_not_tell_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "meminfo").write_text("MemFree: 100 kB")
        monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
        with pytest.raises(UserError, match=r"batch.concat=auto: .*has no MemAvailable"):
            memory_limit(torch.device("cpu"), processes=1)


def test_compiled_blocks_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/g++")
    config = load_config("base", [*MICRO_MODEL, "engine.compile=true"])
    with pytest.raises(UserError, match=r"engine.compile=true: .* no /no/such/g\+\+"):
        compile_blocks(empty_model(config), config.engine)
