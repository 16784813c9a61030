"""The machine and its limits: cores, memory, /dev/shm, ulimits, and temporary files."""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from w2vscale.diagnosis import needs
from w2vscale.diagnosis.cgroups import Limits, limits
from w2vscale.diagnosis.finding import Finding, fail, gigabytes, ok, warn
from w2vscale.diagnosis.gpus import visible
from w2vscale.distributed.launch import slurm_tasks
from w2vscale.errors import counted

SHM = Path("/dev/shm")
LOADING_CORES = needs.AUDIO_RATE // needs.LOADER_RATE + 1  # those that feed an H100, and one for its trainer
TASKS = 200  # processes and threads of a rank: trainer, loaders, NCCL, CUDA, the compiler's
COMFORTABLE = 1024  # open files; the default of most systems
PLENTY = 65536  # open files
LITTLE_MEMORY = 8e9  # bytes per rank: the state of `base` twice while a checkpoint is written (2.3e9), PyTorch, loaders
NO_MEMORY = 2e9  # bytes; PyTorch and the state of the smallest models
LIMITS = "docker run --ulimit {docker}; SLURM: {slurm} for slurmd; others: {other} in /etc/security/limits.conf."


def machine(ranks: int, world_size: int) -> Iterator[Finding]:
    """All checks. `ranks`: processes on this machine, or 0 if none was started; `world_size`: on all machines."""
    group, gpus = limits(), visible()
    ranks = ranks or max(gpus, 1)
    world_size = max(world_size, ranks)
    cores = len(os.sched_getaffinity(0))  # of the mask that SLURM or a container sets
    usable = min(cores, group.cpus or cores)
    # srun can bind each task to its own cores; other launchers let the ranks share those of this process.
    sharing = 1 if slurm_tasks(os.environ) > 1 else ranks
    yield cores_finding(usable, gpus=-(-gpus * sharing // ranks))
    yield threads_finding(os.environ.get("OMP_NUM_THREADS"), cores=cores, usable=usable, ranks=sharing)
    yield memory_finding(*memory_of(group), ranks=ranks)
    space = [needs.shared_memory(preset, ranks, world_size, gpus=gpus) for preset in ("tiny", "base")]
    total, _, free = shutil.disk_usage(SHM) if SHM.is_dir() else (0, 0, 0)
    yield shared_memory_finding(total, free, *space, gpus=gpus)
    yield open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE), needs.open_files(world_size))
    yield tasks_finding([_soft(resource.RLIMIT_NPROC), group.processes], ranks=ranks)
    yield locked_memory_finding(_soft(resource.RLIMIT_MEMLOCK), infiniband=any(Path("/sys/class/infiniband").glob("*")))
    yield temporary_finding()


def cores_finding(usable: float, *, gpus: int) -> Finding:
    """Whether there are enough cores to feed the GPUs."""
    found = f"{usable:g} of {os.cpu_count()} may be used"
    if usable < LOADING_CORES * gpus:
        found += f"; to train `base` on FLAC, {counted(gpus, 'H100')} would need {LOADING_CORES * gpus}"
        advice = f"Request more cores, or set data.workers={max(int(usable // gpus) - 1, 1)}."
        return warn("CPU cores", found, advice)
    return ok("CPU cores", found)


def threads_finding(text: str | None, *, cores: int, usable: float, ranks: int) -> Finding:
    """Whether each rank computes with a fitting number of threads.

    `text`: OMP_NUM_THREADS; `cores`: those of the affinity mask; `usable`: fewer if a control group has a quota.
    """
    advice = f"export OMP_NUM_THREADS={max(int(usable // ranks), 1)}"
    if text is None:
        if usable < cores:  # a quota, which PyTorch does not know
            found = f"OMP_NUM_THREADS is not set: PyTorch starts {cores} threads, and may use {usable:g} cores"
            return warn("threads", found, advice)
        return ok("threads", f"OMP_NUM_THREADS is not set: PyTorch starts one for each core that it may use ({cores})")
    # "4,2" sets the threads of nested loops, too.
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text.strip()):
        return warn("threads", f"OMP_NUM_THREADS={text} is not a number", advice)
    threads = int(text.partition(",")[0])
    if threads * ranks > usable and threads > 1:
        return warn("threads", f"OMP_NUM_THREADS={text} for {counted(ranks, 'rank')} on {usable:g} cores", advice)
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
        advice += " Fewer data.workers, or checkpoint.asynchronous=false, need less."
        return warn("memory", f"{found}: `base` needs about {gigabytes(LITTLE_MEMORY)} per rank", advice)
    return ok("memory", found)


def shared_memory_finding(size: float, free: float, tiny: float, base: float, *, gpus: int) -> Finding:
    """Whether the loader processes can pass micro-batches on through /dev/shm. `tiny`, `base`: needs of presets."""
    found = f"{gigabytes(free)} of {gigabytes(size)} free"
    found += f"; the loader processes of `base` may use {gigabytes(base)}, those of `tiny` {gigabytes(tiny)}"
    if free >= base:
        return ok(str(SHM), found)
    larger = f"{max(2, int((size - free + base) / 1e9) + 1)}g"
    advice = (
        f"Enlarge it (docker run --shm-size={larger}; Kubernetes: a medium: Memory volume at {SHM}; as root: "
        f"mount -o remount,size={larger} {SHM}), or lower data.workers and data.prefetch."
    )
    # On GPUs, `base` is what runs; and NCCL keeps buffers there, too.
    return (fail if gpus or free < tiny else warn)(str(SHM), found, advice)


def open_files_finding(soft: int, hard: int, need: int) -> Finding:
    """Whether a rank may open as many files as it needs. Negative limits: unlimited."""
    if soft < 0 or soft >= max(need, COMFORTABLE):
        return ok("open files", "unlimited" if soft < 0 else f"{soft} (ulimit -n)")
    kind = fail if soft < need else warn
    target = max(need, PLENTY) if hard < 0 else min(max(need, PLENTY), hard)
    advice = f"Run `ulimit -n {target}` in the shell or job script."
    if target < need:
        where = LIMITS.format(docker=f"nofile={max(need, PLENTY)}", slurm="LimitNOFILE", other="nofile")
        advice = f"Ask for a higher hard limit, which is {hard}: {where}"
    return kind("open files", f"{soft} (ulimit -n), and a rank needs about {need}", advice)


def tasks_finding(limits: list[int | None], *, ranks: int) -> Finding:
    """Whether the ranks may start their processes and threads. `limits`: None or negative is none."""
    limit = min((one for one in limits if one is not None and one >= 0), default=None)
    if limit is None:
        return ok("processes", "unlimited")
    found = f"{limit} processes and threads"
    if limit >= TASKS * ranks:
        return ok("processes", found)
    advice = "Raise ulimit -u (nproc in /etc/security/limits.conf), or, for a container, docker run --pids-limit=-1."
    return warn("processes", f"{found}, and {counted(ranks, 'rank')} may need {TASKS * ranks}", advice)


def locked_memory_finding(limit: int, *, infiniband: bool) -> Finding:
    """Whether InfiniBand may lock the memory that it transfers. CUDA's pinned memory does not count."""
    text = "unlimited" if limit < 0 else gigabytes(limit)
    if infiniband and limit >= 0:
        found = f"{text} (ulimit -l), but this machine has InfiniBand or RoCE, whose transfers lock memory"
        where = LIMITS.format(docker="memlock=-1", slurm="LimitMEMLOCK=infinity", other="memlock")
        return warn("locked memory", found, f"Raise the limit: {where}")
    return ok("locked memory", f"{text} (ulimit -l); only InfiniBand needs more")


def temporary_finding() -> Finding:
    """Whether temporary files can be written."""
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(2**20))
    except OSError as error:
        return fail("temporary files", f"cannot be written: {error}", "Set TMPDIR to a folder that can be written.")
    return ok("temporary files", f"can be written to {tempfile.gettempdir()}")


def _soft(limit: int) -> int:
    return resource.getrlimit(limit)[0]
