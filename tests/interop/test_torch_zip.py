"""Files as `torch.save` writes them: PyTorch and Python's zipfile read what was written."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from w2vscale.checkpoint.lazy import LazyTensor, lazy
from w2vscale.interop import torch_zip
from w2vscale.interop.torch_zip import write_torch_zip
from w2vscale.optim.canonical import TensorSpec


def test_every_shape_and_type_is_read_in_every_way(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5),
        "turned": torch.randn(4, 6).t(),
        "scalar": torch.randn(()),
        "integer": torch.tensor(-(2**40)),
        "nothing": torch.empty(0, 3),
        "bits": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-42]),
        "a name with ▁ and é": torch.randn(2, 3, 4),
    }
    path = tmp_path / "a name.pt"
    write_torch_zip(path, lazy(tensors), text="ä\n▁")
    for options in ({"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}):
        found = torch.load(path, **options)
        assert found.keys() == {"model", "text"} and found["text"] == "ä\n▁"
        assert list(found["model"]) == list(tensors)
        for name, tensor in tensors.items():
            read = found["model"][name]
            assert (read.shape, read.dtype, read.requires_grad) == (tensor.shape, tensor.dtype, False)
            assert read.is_contiguous() and read.numpy().tobytes() == tensor.contiguous().numpy().tobytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {record.compress_type for record in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("large", [100, 2**30], ids=["with sizes of 64 bits", "with sizes of 32 bits"])
def test_values_of_any_size_are_aligned(large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "LARGE", large)
    tensors = {str(size): torch.arange(float(size)) for size in (1, 7, 24, 25, 26, 300, 5000)}
    write_torch_zip(tmp_path / "m.pt", lazy(tensors))
    found = torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)["model"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert not any(tensor.data_ptr() % 64 for tensor in found.values())
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.testzip() is None


@pytest.mark.long
@pytest.mark.parametrize("sizes", [[150_000_000] * 8, [540_000_000, 540_000_000, 100_000]], ids=["many", "large"])
def test_files_and_records_of_any_size(sizes: list[int], tmp_path: Path) -> None:
    """Above 4 GiB, and with tensors above 2 GiB, zip files have other fields."""
    tensors = {
        str(number): LazyTensor.made(TensorSpec((size,), torch.float32), partial(values, size, number))
        for number, size in enumerate(sizes)
    }
    path = tmp_path / "large.pt"
    try:
        write_torch_zip(path, tensors)
        assert path.stat().st_size > 2**32
        found = torch.load(path, weights_only=True, mmap=True)["model"]
        for number, size in enumerate(sizes):
            assert found[str(number)].data_ptr() % 64 == 0
            assert torch.equal(found[str(number)], values(size, number))
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    finally:
        path.unlink()


def values(size: int, number: int) -> torch.Tensor:
    return torch.full((size,), float(number)).index_fill_(0, torch.tensor([0, size // 2, size - 1]), number + 0.5)
