"""The disk of the run folder: free space, speed, and the time that a small file takes."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from w2vscale.config import load_config
from w2vscale.diagnosis import needs
from w2vscale.diagnosis.finding import Finding, fail, gigabytes, ok, warn
from w2vscale.diagnosis.gpus import visible

BLOCK = 16 * 2**20  # bytes that are written and synchronised at a time
LARGEST = 256 * 2**20  # bytes of the file
FULL = 2 * LARGEST  # bytes; the speed of a disk with less is not measured
SECONDS = 3.0  # at most, for each measurement
SMALL = int(needs.UTTERANCE * needs.FLAC_BYTES)  # bytes of an utterance
FILES = 20
MEMORY = ("tmpfs", "ramfs")  # file systems that a reboot empties


@dataclass(frozen=True)
class Speed:
    """Bytes per second of one large file, and seconds to open and read a small one."""

    write: float
    read: float
    small_file: float


def disk(folder: str) -> Iterator[Finding]:
    """Space and speed of the disk of `folder`, or of the closest folder above it that exists."""
    place = existing(Path(folder))
    usage = shutil.disk_usage(place)
    yield space_finding(place, usage.free, file_system(place))
    if not os.access(place, os.W_OK | os.X_OK):
        yield fail("disk writing", f"{place} cannot be written", "Choose another --exp, or change its rights.")
        return
    if usage.free < FULL:
        return
    try:
        speed = measure(place)
    except OSError as error:  # such as a quota
        yield fail("disk writing", f"{place} cannot be written: {error.strerror}", "Choose another --exp.")
        return
    yield write_finding(speed.write)
    yield read_finding(speed, gpus=visible())


def existing(folder: Path) -> Path:
    """`folder`, or the closest folder above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def file_system(place: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that a folder is on, such as ext4 or nfs4."""
    found, depth = "unknown file system", -1
    for line in mounts.read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].encode().decode("unicode_escape"))  # a space in a path is \040
        if place.resolve().is_relative_to(point) and len(point.parts) >= depth:
            found, depth = after.split()[0], len(point.parts)
    return found


def space_finding(place: Path, free: float, kind: str) -> Finding:
    """Whether there is room for the checkpoints of `base`."""
    # One more than is kept, because the oldest is deleted only after the newest is complete.
    count = load_config("base").checkpoint.keep_last + 1
    base = count * needs.CHECKPOINTS["base"]
    found = f"{gigabytes(free)} free at {place} ({kind})"
    if free < base:
        kind_of_finding = fail if free < FULL else warn
        return kind_of_finding(
            "disk space",
            f"{found}: {count} checkpoints of `base` need {gigabytes(base)}",
            "Free some space, or choose another folder with --exp. A run that finds no room for a checkpoint ends.",
        )
    if kind in MEMORY:
        return warn("disk space", f"{found}: this is memory, which a reboot empties", "Choose a folder on a disk.")
    largest = [name for name, size in needs.CHECKPOINTS.items() if count * size <= free][-1]
    return ok("disk space", f"{found}, enough for {count} checkpoints of `{largest}`")


def measure(place: Path) -> Speed:
    """Write and read files in `place`, which are gone afterwards, also after Ctrl-C."""
    block = os.urandom(BLOCK)  # so that a file system cannot compress it
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:  # has no name, so even SIGKILL leaves nothing
        size, seconds = 0, 0.0
        start = time.monotonic()
        while size < LARGEST and seconds < SECONDS:
            size += file.write(block)
            os.fsync(file)
            seconds = time.monotonic() - start
        write = size / seconds
        _forget(file.fileno())
        file.seek(0)
        count, start = 0, time.monotonic()
        while (part := len(file.read(BLOCK))) and time.monotonic() - start < SECONDS:
            count += part
        read = count / (time.monotonic() - start)
    return Speed(write, read, _small_file(place, block[:SMALL]))


def _small_file(place: Path, content: bytes) -> float:
    """Median seconds to open and read a file of one utterance."""
    times = []
    with tempfile.TemporaryDirectory(prefix=".w2vscale-doctor-", dir=place) as folder:
        paths, start = [Path(folder, str(number)) for number in range(FILES)], time.monotonic()
        for number, path in enumerate(paths):
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file)
                _forget(file.fileno())
            if number and time.monotonic() - start > SECONDS:
                break
        for path in paths[: number + 1]:
            start = time.monotonic()
            path.read_bytes()
            times.append(time.monotonic() - start)
    return statistics.median(times)


def _forget(descriptor: int) -> None:
    """Ask Linux to drop a file from memory, so that reading it shows the disk. A server may have it in its own."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_finding(speed: float) -> Finding:
    """Whether checkpoints can be written in the time that a stopped run has for it."""
    grace = load_config("base").checkpoint.grace_seconds
    found = f"writes {gigabytes(speed)}/s: a checkpoint of `base` takes {needs.CHECKPOINTS['base'] / speed:.0f} s"
    advice = "Put the run folder (--exp) on a faster disk, or raise checkpoint.grace_seconds and checkpoint.every."
    if speed * grace < needs.CHECKPOINTS["base"]:
        return fail("disk writing", f"{found}, and a stopped run has {grace:g} s (checkpoint.grace_seconds)", advice)
    # Half of the time: other programs use the disk, too.
    if speed * grace / 2 < needs.CHECKPOINTS["large"]:
        return warn("disk writing", f"{found}, one of `large` {needs.CHECKPOINTS['large'] / speed:.0f} s", advice)
    return ok("disk writing", found)


def read_finding(speed: Speed, *, gpus: int) -> Finding:
    """Whether the GPUs would wait for audio, if it were on this disk."""
    found = f"reads {gigabytes(speed.read)}/s, a file of one utterance in {1000 * speed.small_file:.1f} ms"
    need = needs.AUDIO_RATE * needs.FLAC_BYTES * gpus
    loaders = load_config("base").data.workers
    time_for_one = loaders * needs.UTTERANCE / needs.AUDIO_RATE
    if gpus and speed.read < need:
        return warn(
            "disk reading",
            f"{found}: {gpus} H100 read {gigabytes(need)}/s of FLAC when they train `base`",
            "If the audio is on this disk, copy it to a faster one.",
        )
    if gpus and speed.small_file > time_for_one:
        return warn(
            "disk reading",
            f"{found}: {loaders} loader processes that feed an H100 have {1000 * time_for_one:.0f} ms for each",
            "If the audio is on this disk, use shards (data.mode=stream) or more data.workers.",
        )
    return ok("disk reading", found)
