"""Names and peak speeds of devices."""

from __future__ import annotations

import pytest
import torch

from w2vscale.config import load_config
from w2vscale.hardware import cpu_name, device_name, memory_used, peak_flops
from w2vscale.planning.work import flops_per_second_of_audio, model_of


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA T400 4GB", None),
    ],
)
def test_published_peaks(name: str, teraflops: int | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_this_machine_has_a_name_and_uses_memory() -> None:
    assert cpu_name() == device_name(torch.device("cpu")) != ""
    before = memory_used(torch.device("cpu"))
    block = torch.ones(2**26)  # 256 MiB
    assert memory_used(torch.device("cpu")) >= before
    assert memory_used(torch.device("cpu")) > block.numel() * block.element_size()


def test_the_operations_of_a_whole_model_are_those_of_its_units() -> None:
    config = load_config("tiny", ["model.layers=5"])
    assert flops_per_second_of_audio(config) == pytest.approx(model_of("tiny", config).flops)
