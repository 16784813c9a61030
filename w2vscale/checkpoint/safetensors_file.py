"""The types of tensors in safetensors files, and writing such a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import IO

import torch
from torch import Tensor

from w2vscale.files import safetensors_header
from w2vscale.optim.canonical import Specs

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""Types by their names in safetensors files."""


def write_safetensors(
    file: IO[bytes], specs: Specs, tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with these names, shapes and types. `tensors` may be made one at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {name: (names[spec.dtype], spec.shape) for name, spec in specs.items()}
    file.write(safetensors_header(header, metadata))
    for tensor in tensors:
        file.write(tensor.contiguous().numpy().data)
