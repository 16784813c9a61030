"""GPUs: whether PyTorch can use those of this machine, and what they can do."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from w2vscale.diagnosis.finding import Finding, fail, gigabytes, ok, warn

DRIVER = Path("/proc/driver/nvidia/version")
IN_USE = 2e9  # bytes; the CUDA context of this process takes about 0.5e9 of them
NONE_VISIBLE = "No CUDA GPUs are available"  # as PyTorch says it
BF16_SINCE = (8, 0)  # compute capability: Ampere


@dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch sees. `problem`: why it computes nothing, or ""; memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int
    problem: str = ""


@dataclass(frozen=True)
class Cuda:
    """What this machine and this PyTorch have.

    `driver`: its version, if it is loaded; `devices`: whether this process may open GPUs; `build`: the version of CUDA
    that PyTorch is built for; `named`: CUDA_VISIBLE_DEVICES; `gpus`: those that PyTorch sees; `problem`: why it sees
    none.
    """

    driver: str | None
    devices: bool
    build: str | None
    named: str | None
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


def gpus() -> Iterator[Finding]:
    """GPUs, BF16, NCCL, and what torch.compile needs."""
    import torch
    import torch.distributed as dist

    found = cuda()
    yield gpu_finding(found)
    if not found.gpus:
        yield ok("NCCL", "not needed without a GPU: processes communicate through gloo")
        return
    yield memory_finding(found.gpus)
    yield bf16_finding(found.gpus)
    version = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
    yield nccl_finding(version, len(found.gpus))
    from w2vscale.engine.transforms import missing_for_compilation  # last: it imports much more

    yield compile_finding(missing_for_compilation(torch.device("cuda")))


def cuda() -> Cuda:
    """Look at the machine and at PyTorch, and compute something on each GPU."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    build = torch.version.cuda or torch.version.hip
    problem, seen = "", list[Gpu]()
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
    else:
        seen = [_gpu(index) for index in range(torch.cuda.device_count())]
    devices = any(Path("/dev").glob("nvidia[0-9]*"))
    return Cuda(driver_version(), devices, build, named, tuple(seen), problem)


def visible(devices: Path = Path("/dev")) -> int:
    """The number of GPUs that this process may use, as far as can be seen without PyTorch."""
    found = len(list(devices.glob("nvidia[0-9]*")))  # a container has only its own
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return found
    return min(found, sum(name.strip() not in ("", "-1") for name in named.split(",")))


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None if none is loaded."""
    with suppress(OSError):
        if found := re.search(r"\s(\d+\.\d+[.\d]*)\s", DRIVER.read_text()):
            return found[1]
    return None


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    problem, free = "", 0
    try:
        one = torch.ones(64, 64, device=f"cuda:{index}")
        assert float((one @ one).sum()) == 64.0**3
        free = torch.cuda.mem_get_info(index)[0]
    except (RuntimeError, AssertionError) as error:  # its kernels are not in this PyTorch, or it is defective
        problem = (str(error) or "computes a wrong product").splitlines()[0]
    return Gpu(properties.name, (properties.major, properties.minor), properties.total_memory, free, problem)


def gpu_finding(cuda: Cuda) -> Finding:
    """Whether PyTorch computes on the GPUs of this machine."""
    if broken := [f"GPU {index} ({gpu.name}): {gpu.problem}" for index, gpu in enumerate(cuda.gpus) if gpu.problem]:
        advice = "Install a PyTorch that supports these GPUs (pytorch.org/get-started). If it does, a GPU is defective."
        return fail("GPU", "; ".join(broken), advice)
    if cuda.gpus:
        kinds = ", ".join(f"{count} × {name}" for name, count in Counter(gpu.name for gpu in cuda.gpus).items())
        memory = gigabytes(min(gpu.memory for gpu in cuda.gpus))
        return ok("GPU", f"{kinds}, {memory} each, driver {cuda.driver or 'unknown'}, CUDA {cuda.build}")
    if cuda.driver is None:
        found = "none found: training runs on the CPU, which is for small models and tests"
        advice = (
            "Use a machine with NVIDIA GPUs to pretrain. If this is one, install their driver: nvidia-smi must work."
        )
        return warn("GPU", found, advice)
    if cuda.named is not None and cuda.named.strip() in ("", "-1"):
        found = f"CUDA_VISIBLE_DEVICES={cuda.named} hides those of this machine: training runs on the CPU"
        return warn("GPU", found, "unset CUDA_VISIBLE_DEVICES")
    return fail("GPU", *_unusable(cuda))


def _unusable(cuda: Cuda) -> tuple[str, str]:
    """Why PyTorch sees none of the GPUs that are there, and what to do."""
    there = f"this machine has NVIDIA's driver {cuda.driver}, but"
    if cuda.build is None:
        return f"{there} PyTorch is a CPU build", (
            "Install a CUDA build: pip uninstall torch, then the command of pytorch.org/get-started for a CUDA version "
            "that the driver supports (`nvidia-smi` prints it)."
        )
    if not cuda.devices:
        advice = "Start the container with GPUs (docker run --gpus all), or request them for the job (--gpus-per-node)."
        return f"{there} this container or job may not use its GPUs", advice
    if cuda.named is not None and NONE_VISIBLE in cuda.problem:
        found = f"CUDA_VISIBLE_DEVICES={cuda.named} names none of the GPUs that this process may use"
        return found, "Unset it, or name GPUs that `nvidia-smi -L` lists."
    found = f"{there} PyTorch for CUDA {cuda.build} cannot use its GPUs: {cuda.problem}"
    return found, "Update the driver, or install a PyTorch for an older CUDA (pytorch.org/get-started)."


def memory_finding(gpus: tuple[Gpu, ...]) -> Finding:
    """Whether other processes use the GPUs."""
    used = {index: gpu.memory - gpu.free for index, gpu in enumerate(gpus) if not gpu.problem}
    if taken := [f"GPU {index}: {gigabytes(size)}" for index, size in used.items() if size > IN_USE]:
        advice = "`nvidia-smi` lists them; end them, or choose other GPUs with CUDA_VISIBLE_DEVICES."
        return warn("GPU memory", f"used by other processes: {', '.join(taken)}", advice)
    return ok("GPU memory", f"{gigabytes(min(gpu.free for gpu in gpus))} free")


def bf16_finding(gpus: tuple[Gpu, ...]) -> Finding:
    """Whether the GPUs compute in BF16, the default."""
    if old := [gpu.name for gpu in gpus if gpu.capability < BF16_SINCE]:
        return warn("BF16", f"not supported by {old[0]}", "Train with precision.compute=fp32.")
    return ok("BF16", "supported by the GPU")


def nccl_finding(version: str | None, gpus: int) -> Finding:
    """Whether this PyTorch has NCCL, which processes on GPUs communicate through."""
    if version is not None:
        return ok("NCCL", version)
    kind = fail if gpus > 1 else warn
    advice = "Install PyTorch from pytorch.org/get-started: its builds for Linux contain NCCL."
    return kind("NCCL", "not in this PyTorch, so several GPUs cannot train together", advice)


def compile_finding(missing: str | None) -> Finding:
    """Whether torch.compile has what it needs on a GPU."""
    if missing is None:
        return ok("torch.compile", "Triton, a C compiler and Python.h are there")
    return warn("torch.compile", f"needs {missing}", "Install it; without it nothing is compiled, and runs are slower.")
