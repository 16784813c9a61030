"""What a machine computes with: names of processors and GPUs, and the peak speeds that their vendors publish."""

from __future__ import annotations

import platform
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PEAK_FLOPS: dict[str, float] = {
    r"GB[23]00|B[23]00": 2.25e15,
    r"H[12]00.*PCIe": 7.56e14,
    r"GH200|H[12]00|H800": 9.89e14,
    r"H20\b": 1.48e14,
    r"A[18]00": 3.12e14,
    r"L40S": 3.62e14,
    r"L40\b": 1.81e14,
    r"L4\b": 1.21e14,
    r"A40\b": 1.497e14,
    r"A30\b": 1.65e14,
    r"A10\b": 1.25e14,
    r"RTX 4090": 1.65e14,
    r"MI300X": 1.307e15,
    r"MI250X": 3.83e14,
}
"""Dense bf16 operations per second, from the data sheets, by a regular expression that the name of the GPU matches."""


def peak_flops(name: str) -> float | None:
    """Return the published peak of a GPU in bf16 matrix products, per second; None if the table does not have it."""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)


def cpu_name() -> str:
    """Return the name of the processor, or that of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def memory_used(device: torch.device) -> int:
    """Return the most bytes that this process has used so far: of tensors on a GPU, or of all memory on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
