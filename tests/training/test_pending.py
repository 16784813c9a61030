"""What the host reads late from a device."""

from __future__ import annotations

import time

import pytest
import torch

from w2vscale.training.pending import HostCopy, Mark

CPU = torch.device("cpu")


def test_on_a_cpu_everything_is_ready_at_once() -> None:
    before = Mark(CPU)
    copy = HostCopy(torch.tensor(2.5))
    time.sleep(0.02)
    later = Mark(CPU)
    assert copy.read() == 2.5
    assert 0.02 <= copy.ready.seconds_to(later) <= before.seconds_to(later) < 5.0


@pytest.mark.cuda
def test_a_read_waits_for_the_value_and_not_for_later_work() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    scalar, idle = torch.zeros((), device=device), Mark(device)
    torch.cuda._sleep(100_000_000)  # cycles, at most 2 GHz
    copy = HostCopy(scalar + 3.0)
    torch.cuda._sleep(2_000_000_000)
    end = Mark(device)
    began = time.perf_counter()
    assert copy.read() == 3.0
    assert time.perf_counter() - began < 0.5
    assert 0.04 < idle.seconds_to(copy.ready) < copy.ready.seconds_to(end)
    assert copy.ready.seconds_to(end) > 0.8
