"""Write the zip files of `torch.save`, one tensor at a time.

`torch.save` needs all tensors in memory. This writes the same format: records that are not compressed, and a pickle in
which each tensor names the record of its values (PyTorch's `torch/serialization.py` and `caffe2/serialize`).
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from w2vscale.checkpoint.lazy import LazyTensor

FOLDER = "archive"  # of the records in the zip file
VERSION = b"3\n"  # of the format, since PyTorch 1.6
ALIGNMENT = 64  # bytes: values begin at a multiple of it, so that a mapped file has aligned tensors
LOCAL_HEADER = 30  # bytes before a record, besides its name and extra fields
LARGE = 2**30  # bytes: a record of this size has a second extra field, as the format demands of records above 4 GiB
SIZES_FIELD = 20  # bytes of this field, which has the sizes of 64 bits and follows the padding
PADDING = b"FB"  # identifies the extra field that aligns a record, as in the files of torch.save
STORAGES: dict[torch.dtype, Any] = {torch.float32: torch.FloatStorage, torch.int64: torch.LongStorage}


def write_torch_zip(path: Path, tensors: Mapping[str, LazyTensor], **texts: str) -> None:
    """Write {"model": `tensors`, **`texts`} for `torch.load`, also with `weights_only=True` and `mmap=True`.

    Tensors are fp32 or int64, and each gets a storage of its own. Holds one tensor at a time. OSError if the file
    cannot be written.
    """
    stored = {name: _Stored(_Storage(key, tensor)) for key, (name, tensor) in enumerate(tensors.items())}
    with zipfile.ZipFile(path, "w") as archive:
        _write(archive, "data.pkl", _pickled({"model": stored, **texts}))
        _write(archive, "byteorder", sys.byteorder.encode())
        for key, tensor in enumerate(tensors.values()):
            _write(archive, f"data/{key}", tensor.whole().contiguous().view(-1).numpy().data)
        _write(archive, "version", VERSION)


class _Storage(NamedTuple):
    """The values of a tensor: number of their record, and what they are."""

    key: int
    tensor: LazyTensor


class _Stored(NamedTuple):
    """A tensor. It is pickled as the call with which PyTorch makes a tensor from its values."""

    storage: _Storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.tensor.shape
        strides = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        dtype = obj.tensor.dtype
        return "storage", STORAGES[dtype], str(obj.key), "cpu", obj.tensor.bytes // dtype.itemsize


def _pickled(content: object) -> bytes:
    file = BytesIO()
    _Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def _write(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Write a record."""
    record = zipfile.ZipInfo(f"{FOLDER}/{name}")
    record.file_size = memoryview(content).nbytes
    assert archive.fp is not None
    large = record.file_size >= LARGE
    start = archive.fp.tell() + LOCAL_HEADER + len(record.filename) + 4  # identifier and size of the padding
    padding = -(start + large * SIZES_FIELD) % ALIGNMENT
    record.extra = PADDING + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(record, "w", force_zip64=large) as file:
        file.write(content)
