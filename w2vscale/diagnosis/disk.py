"""The disk of the run folder: free space, speed, and the time that a small file takes."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
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
FILES = 10


def disk(folder: str) -> Iterator[Finding]:
    """Space and speed of the disk of `folder`, or of the closest folder above it that exists."""
    place, other = existing(Path(folder)), "Choose another --exp."
    if os.path.lexists(folder) and place != Path(folder):
        yield fail("disk space", f"{folder} is not a folder", other)
        return
    free = shutil.disk_usage(place).free
    yield space_finding(place, free)
    if free < FULL:
        return
    try:
        write, read = speed(place)
        small_file = small_file_seconds(place)
    except OSError as error:  # no rights, or a quota
        yield fail("disk writing", f"{place} cannot be written: {error.strerror}", other)
        return
    yield write_finding(write)
    yield read_finding(read, small_file, gpus=visible())


def existing(folder: Path) -> Path:
    """`folder`, or the closest folder above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def space_finding(place: Path, free: float) -> Finding:
    """Whether there is room for the checkpoints of `base`."""
    # One more than is kept, because the oldest is deleted only after the newest is complete.
    count = load_config("base").checkpoint.keep_last + 1
    found = f"{gigabytes(free)} free at {place}"
    if fitting := [name for name, size in needs.CHECKPOINTS.items() if count * size <= free]:
        return ok("disk space", f"{found}, enough for {count} checkpoints of `{fitting[-1]}`")
    found += f": {count} checkpoints of `base` need {gigabytes(count * needs.CHECKPOINTS['base'])}"
    kind = fail if free < FULL else warn
    return kind("disk space", found, "Free some space, or choose a folder on another disk with --exp.")


def speed(place: Path) -> tuple[float, float]:
    """Bytes per second in which a large file is written to the disk, and read."""
    block = os.urandom(BLOCK)  # so that a file system cannot compress it
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:  # has no name, so even SIGKILL leaves nothing
        size, start = 0, time.monotonic()
        while size < LARGEST and time.monotonic() - start < SECONDS:
            size += file.write(block)
            os.fsync(file)
        write = size / (time.monotonic() - start)
        _forget(file.fileno())
        file.seek(0)
        size, start = 0, time.monotonic()
        while (part := len(file.read(BLOCK))) and time.monotonic() - start < SECONDS:
            size += part
        return write, size / (time.monotonic() - start)


def small_file_seconds(place: Path) -> float:
    """Median seconds to open and read a file of one utterance."""
    times = []
    with tempfile.TemporaryDirectory(prefix=".w2vscale-doctor-", dir=place) as folder:
        paths = [Path(folder, str(number)) for number in range(FILES)]
        for path in paths:
            with path.open("wb", buffering=0) as file:
                file.write(os.urandom(SMALL))
                os.fsync(file)
                _forget(file.fileno())
        for path in paths:
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


def read_finding(speed: float, small_file: float, *, gpus: int) -> Finding:
    """Whether the GPUs would wait for audio, if it were on this disk."""
    found = f"reads {gigabytes(speed)}/s, a file of one utterance in {1000 * small_file:.1f} ms"
    loaders, need = load_config("base").data.workers, needs.AUDIO_RATE * needs.FLAC_BYTES * gpus
    if speed < need:
        found += f": {gpus} H100 read {gigabytes(need)}/s of FLAC when they train `base`"
        return warn("disk reading", found, "If the audio is on this disk, copy it to a faster one.")
    if gpus and small_file > (limit := loaders * needs.UTTERANCE / needs.AUDIO_RATE):
        found += f": {loaders} loader processes that feed an H100 have {1000 * limit:.0f} ms for each"
        advice = "If the audio is on this disk, use shards (data.mode=stream) or more data.workers."
        return warn("disk reading", found, advice)
    return ok("disk reading", found)
