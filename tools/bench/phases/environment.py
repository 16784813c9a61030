"""What the machine is, and its two ceilings: the rate of matrix products and that of copies."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch
from torch.nn import functional as F

from tools.bench.phases.measuring import Machine, Rows, attempt, median_ms, release_memory
from w2vscale.hardware import cpu_name

LONG_SECONDS = 300
"""Audio of the forward whose matrix products are measured."""


BACKENDS = {backend.value: name for name, backend in torch.nn.attention.SDPBackend.__members__.items()}
"""Names of PyTorch's numbers of attention back-ends."""


def environment(machine: Machine) -> Rows:
    """Versions, the attention back-ends in order of preference, copy bandwidth, rates of matrix products."""
    device = machine.device
    yield "versions", versions()
    yield "processor", {"name": cpu_name(), "cores": os.cpu_count()}
    yield "gpu", _gpu(device) if machine.on_gpu else None
    yield "attention_order", attention_order()
    yield "attention_chosen", attempt(lambda: attention_chosen(device))
    size = 2**20 if machine.tiny else 2**31
    yield "copy_bytes_per_second", copy_bandwidth(device, size)
    yield "matrix_flops", matrix_flops(device, 256 if machine.tiny else 8192, repeats=3 if machine.tiny else 20)
    for name in ("base", "large"):
        yield f"{name}_matrix_flops", model_matrix_flops(machine, name)


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "memory_bytes": properties.total_memory}


def versions() -> dict[str, Any]:
    """Versions of what takes part."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        nccl = torch.cuda.nccl.version()
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, nccl))}
    for package in ("deepspeed", "transformers", "lhotse", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def attention_order() -> list[str]:
    """The back-ends of scaled dot-product attention, in PyTorch's order; a choice also depends on the inputs."""
    return [BACKENDS.get(number, str(number)) for number in torch._C._get_sdp_priority_order()]


def attention_chosen(device: torch.device) -> dict[str, str]:
    """The back-end that PyTorch chooses by default with dropout, without and with a mask of padding.

    An engine turns cuDNN off first (`build_engine`).
    """
    q_BHTE = torch.randn(4, 12, 780, 64, device=device, dtype=torch.bfloat16)
    mask = torch.ones(4, 1, 1, 780, dtype=torch.bool, device=device)
    return {
        "no mask": BACKENDS[torch._fused_sdp_choice(q_BHTE, q_BHTE, q_BHTE, dropout_p=0.1)],
        "mask": BACKENDS[torch._fused_sdp_choice(q_BHTE, q_BHTE, q_BHTE, attn_mask=mask, dropout_p=0.1)],
    }


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = median_ms(lambda: target.copy_(source), device, repeats=10)
    return 2 * size / milliseconds * 1000


def matrix_flops(
    device: torch.device, rows: int, inputs: int | None = None, outputs: int | None = None, *, repeats: int = 10
) -> float:
    """FLOP/s of [rows, inputs] x [inputs, outputs] in bf16, on random values; square by default."""
    inputs, outputs = inputs or rows, outputs or rows
    x, weight = (torch.randn(shape, device=device).bfloat16() for shape in ((rows, inputs), (outputs, inputs)))
    milliseconds = median_ms(lambda: F.linear(x, weight), device, repeats=repeats)
    release_memory()
    return 2 * rows * inputs * outputs / milliseconds * 1000


def model_matrix_flops(machine: Machine, name: str) -> dict[str, float]:
    """FLOP/s of the products of a block and of the feature encoder's second layer, in a forward of `LONG_SECONDS`."""
    model = machine.config(name).model
    seconds = 1 if machine.tiny else LONG_SECONDS
    frames = 50 * seconds
    channels = model.conv_layers[1][0]
    shapes = {
        "qkv": (frames, model.dim, 3 * model.dim),
        "attention out": (frames, model.dim, model.dim),
        "feed-forward in": (frames, model.dim, model.ffn_dim),
        "feed-forward out": (frames, model.ffn_dim, model.dim),
        "feature encoder": (32 * frames, 2 * channels, channels),
    }
    return {product: matrix_flops(machine.device, *shape) for product, shape in shapes.items()}
