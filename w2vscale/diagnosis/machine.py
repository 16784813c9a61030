"""The machine and its limits: processors, memory, /dev/shm, ulimits, clock, locale, folder for temporary files."""

from __future__ import annotations

import codecs
import locale
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from w2vscale.diagnosis import needs
from w2vscale.diagnosis.cgroups import Limits, limits
from w2vscale.diagnosis.finding import Finding, fail, gigabytes, ok, warn
from w2vscale.diagnosis.gpus import visible
from w2vscale.errors import counted

SHM = Path("/dev/shm")
LOADING_CORES = needs.AUDIO_RATE // needs.LOADER_RATE + 1  # those that feed an H100, and one for its trainer
TASKS = 200  # processes and threads of a rank: trainer, loaders, NCCL, CUDA, the compiler's
COMFORTABLE = 1024  # open files; the default of most systems
LITTLE_MEMORY = 8e9  # bytes per rank: the state of `base` twice while a checkpoint is written (2.3e9), PyTorch, loaders
NO_MEMORY = 2e9  # bytes; PyTorch and the state of the smallest models
TEMPORARY = 100e6  # bytes; compiled kernels, sockets


@dataclass(frozen=True)
class Processors:
    """Numbers of CPUs: of the machine, and those that this process may use. `bf16`: whether they compute in BF16."""

    machine: int
    usable: float
    bf16: bool


def machine(ranks: int, world_size: int) -> Iterator[Finding]:
    """All checks. `ranks`: processes on this machine, or 0 if none was started; `world_size`: on all machines."""
    group, gpus = limits(), visible()
    ranks = ranks or max(gpus, 1)
    processors = processors_of(group)
    yield processors_finding(processors, gpus=gpus)
    if not gpus:
        yield cpu_bf16_finding(processors)
    yield threads_finding(os.environ, processors, ranks=ranks)
    yield memory_finding(*memory_of(group), ranks=ranks)
    yield shared_memory_finding(*_space(SHM), ranks=ranks, gpus=gpus)
    yield open_files_finding(resource.getrlimit(resource.RLIMIT_NOFILE), needs.open_files(ranks, world_size))
    yield tasks_finding([_soft(resource.RLIMIT_NPROC), group.processes], ranks=ranks)
    yield locked_memory_finding(_soft(resource.RLIMIT_MEMLOCK), infiniband=_infiniband())
    yield core_finding(_soft(resource.RLIMIT_CORE))
    yield clock_finding(time.time(), Path(__file__).stat().st_mtime)
    yield locale_finding(locale.getpreferredencoding(False))
    yield temporary_finding()


def processors_of(group: Limits) -> Processors:
    """Count the CPUs."""
    allowed = len(os.sched_getaffinity(0))
    flags: set[str] = set()
    with suppress(OSError):
        line = re.search(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        flags = set(line[1].split()) if line else flags
    bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    return Processors(os.cpu_count() or allowed, min(allowed, group.cpus or allowed), bf16)


def processors_finding(found: Processors, *, gpus: int) -> Finding:
    """Whether there are enough CPUs to feed the GPUs."""
    some = f"{found.usable:g} of {found.machine}" if found.usable < found.machine else f"{found.machine}"
    if found.usable < LOADING_CORES * gpus:
        return warn(
            "CPU cores",
            f"{some} may be used; an H100 that trains `base` on FLAC needs {LOADING_CORES}, and there are {gpus} GPUs",
            f"Request more cores, or set data.workers to about {max(int(found.usable // gpus) - 1, 1)}.",
        )
    return ok("CPU cores", some)


def cpu_bf16_finding(found: Processors) -> Finding:
    """Whether the CPU computes in BF16, which matters where there is no GPU."""
    if found.bf16:
        return ok("BF16 on CPU", "supported")
    return warn(
        "BF16 on CPU",
        "not supported: small models take twice as long as in fp32",
        "On this CPU, set precision.compute=fp32, as the preset tiny does.",
    )


def threads_finding(environment: Mapping[str, str], found: Processors, *, ranks: int) -> Finding:
    """Whether each process computes with a fitting number of threads."""
    text, fair = environment.get("OMP_NUM_THREADS"), max(int(found.usable // ranks), 1)
    advice = f"export OMP_NUM_THREADS={fair}"
    # "4,2" sets the threads of nested loops, too.
    if text is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text.strip()):
        return warn("threads", f"OMP_NUM_THREADS={text} is not a number", advice)
    if text is None:
        # Without it, PyTorch counts the cores that its affinity allows, but not the quota of a container.
        if found.usable < found.machine:
            return warn(
                "threads",
                f"OMP_NUM_THREADS is not set, and PyTorch may start {found.machine} threads on {found.usable:g} cores",
                advice,
            )
        return ok("threads", f"OMP_NUM_THREADS is not set; PyTorch uses all of {counted(found.machine, 'core')}")
    threads = int(text.partition(",")[0])
    if threads * ranks > found.usable and threads > 1:
        return warn("threads", f"OMP_NUM_THREADS={text} for {counted(ranks, 'rank')} on {found.usable:g} cores", advice)
    return ok("threads", f"OMP_NUM_THREADS={text}")


def memory_of(group: Limits) -> tuple[float, float]:
    """Bytes of memory that this process may use, and those of them that are free."""
    text = Path("/proc/meminfo").read_text()
    total, free = (1024.0 * int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1])  # type: ignore[index]
                   for name in ("MemTotal", "MemAvailable"))  # fmt: skip
    if group.memory is not None and group.memory < total:
        return group.memory, min(free, group.memory - group.memory_used)
    return total, free


def memory_finding(total: float, free: float, *, ranks: int) -> Finding:
    """Whether host memory suffices for the ranks of this machine."""
    found = f"{gigabytes(free)} of {gigabytes(total)} free, for {counted(ranks, 'rank')}"
    advice = "End other programs, or request more memory for the container or job."
    if free < NO_MEMORY:
        return fail("memory", f"{found}: PyTorch with a small model needs {gigabytes(NO_MEMORY)}", advice)
    if free < LITTLE_MEMORY * ranks:
        return warn(
            "memory",
            f"{found}: `base` needs about {gigabytes(LITTLE_MEMORY)} per rank",
            f"{advice} Fewer data.workers, or checkpoint.asynchronous=false, need less.",
        )
    return ok("memory", found)


def shared_memory_finding(size: float, free: float, *, ranks: int, gpus: int) -> Finding:
    """Whether the loader processes can pass micro-batches on through /dev/shm."""
    base, tiny = (needs.shared_memory(preset, ranks, gpus=gpus) for preset in ("base", "tiny"))
    found = f"{gigabytes(free)} of {gigabytes(size)} free"
    advice = (
        f"Enlarge it to 2 GB or more (docker run --shm-size=2g; Kubernetes: a medium: Memory volume at {SHM}; else: "
        f"mount -o remount,size=2g {SHM}), or lower data.workers and data.prefetch."
    )
    # NCCL keeps buffers there, too, and fails with less than a few MB for each GPU.
    if free < tiny or (gpus and free < base):
        preset, need = ("base", base) if gpus else ("tiny", tiny)
        return fail(str(SHM), f"{found}: the loader processes of `{preset}` need {gigabytes(need)}", advice)
    if free < base:
        return warn(str(SHM), f"{found}: enough for `tiny`, but `base` needs {gigabytes(base)}", advice)
    return ok(str(SHM), f"{found}; `base` needs {gigabytes(base)}")


def open_files_finding(limit: tuple[int, int], need: int) -> Finding:
    """Whether a rank may open as many files as it needs. `limit`: soft and hard."""
    soft, hard = limit
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    advice = f"Run `ulimit -n {COMFORTABLE if hard < 0 else min(max(need, 65536), hard)}` in the shell or job script."
    if 0 <= soft < need:
        return fail("open files", f"{soft} (ulimit -n; at most {most}): a rank needs about {need}", advice)
    if 0 <= soft < COMFORTABLE:
        return warn("open files", f"{soft} (ulimit -n; at most {most}): a rank needs about {need} and more", advice)
    return ok("open files", "unlimited" if soft < 0 else f"{soft} (ulimit -n)")


def tasks_finding(found: list[int | None], *, ranks: int) -> Finding:
    """Whether the ranks may start their processes and threads. `found`: limits; None or negative is none."""
    limit = min((one for one in found if one is not None and one >= 0), default=None)
    if limit is None:
        return ok("processes", "unlimited")
    if limit < TASKS * ranks:
        return warn(
            "processes",
            f"{limit} processes and threads: each rank needs about {TASKS}, and there may be {ranks}",
            "Raise ulimit -u, or the limit of the container (docker run --pids-limit).",
        )
    return ok("processes", f"{limit} processes and threads")


def locked_memory_finding(limit: int, *, infiniband: bool) -> Finding:
    """Whether InfiniBand may lock the memory that it transfers. CUDA's pinned memory does not count."""
    text = "unlimited" if limit < 0 else gigabytes(limit)
    if infiniband and limit >= 0:
        return warn(
            "locked memory",
            f"{text} (ulimit -l), but this machine has InfiniBand or RoCE, whose transfers lock memory",
            "Set ulimit -l unlimited (docker run --ulimit memlock=-1; SLURM: LimitMEMLOCK=infinity for slurmd).",
        )
    return ok("locked memory", f"{text} (ulimit -l); only InfiniBand needs more")


def core_finding(limit: int) -> Finding:
    """How much a rank that crashes writes to the disk."""
    if limit == 0:
        return ok("core files", "none is written (ulimit -c 0)")
    size = "all memory" if limit < 0 else gigabytes(limit)
    return ok("core files", f"a rank that crashes may write {size} to the disk; ulimit -c 0 avoids this")


def clock_finding(now: float, installed: float) -> Finding:
    """Whether the clock is later than the files of this package."""
    shown = f"{datetime.fromtimestamp(now):%Y-%m-%d %H:%M:%S}"
    if now < installed - 86_400:
        return warn(
            "clock",
            f"{shown} is before the installation of w2vscale",
            "Set the clock (NTP): object stores and web servers refuse wrong times, and make and logs mislead.",
        )
    return ok("clock", shown)


def locale_finding(encoding: str) -> Finding:
    """Whether text files are UTF-8 by default."""
    if codecs.lookup(encoding).name == "utf-8":
        return ok("locale", "UTF-8")
    return warn(
        "locale",
        f"the encoding of this locale is {encoding}: names and transcripts may be printed as escapes",
        "export LC_ALL=C.UTF-8",
    )


def temporary_finding() -> Finding:
    """Whether temporary files can be written and, for compiled kernels, loaded."""
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile() as file:
            file.write(b"w2vscale")
    except OSError as error:
        return fail("temporary files", f"cannot be written: {error}", "Set TMPDIR to a folder that can be written.")
    free = _space(Path(folder))[1]
    if free < TEMPORARY:
        return warn("temporary files", f"{folder} has {gigabytes(free)} free", "Free some space, or set TMPDIR.")
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return warn(
            "temporary files",
            f"{folder} is mounted with noexec: compiled kernels cannot be loaded from there",
            "Set TMPDIR, or TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR, to another file system.",
        )
    return ok("temporary files", f"{folder}, {gigabytes(free)} free")


def _space(folder: Path) -> tuple[float, float]:
    """Size and free space of a file system in bytes; zeros if there is none."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return 0.0, 0.0
    return float(usage.total), float(usage.free)


def _soft(limit: int) -> int:
    return resource.getrlimit(limit)[0]


def _infiniband() -> bool:
    """Whether this machine has a link that transfers memory by itself (RDMA)."""
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())
