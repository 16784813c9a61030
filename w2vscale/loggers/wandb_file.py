"""Reads the file of an offline run of W&B: records of Protocol Buffers in LevelDB's log format.

Offline, W&B does not say which steps a run has. It writes them every 15 seconds, so a killed process loses some.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = 7  # bytes of the file: ":W&B", a magic number, a version
BLOCK = 2**15  # bytes; what is left of one is padding if a header does not fit
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Yield the complete records, `wandb_internal_pb2.Record`."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # without type information

    for content in chunks(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(content)
        yield record


def chunks(data: bytes) -> Iterator[bytes]:
    """Yield the contents of the records of a log. One that a killed process left incomplete ends it."""
    at, begun = HEADER, b""
    while True:
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
        if at + HEADER > len(data):
            return
        _checksum, size, kind = struct.unpack_from("<IHB", data, at)
        content = data[at + HEADER : at + HEADER + size]
        if len(content) < size or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        at += HEADER + size
        begun = content if kind in (FULL, FIRST) else begun + content
        if kind in (FULL, LAST):
            yield begun


def last_step(path: Path) -> int:
    """Return the last step of the history in a file; -1 if there is none."""
    steps = [record.history.step.num for record in records(path) if record.WhichOneof("record_type") == "history"]
    return max(steps, default=-1)
