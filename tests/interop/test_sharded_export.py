"""Exports to Transformers that are larger than one file of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.converted import to_huggingface
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.config import Config
from w2vscale.interop import exporting
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.interop.importing import import_checkpoint

transformers = pytest.importorskip("transformers", reason="Transformers is not installed (extra huggingface)")

SHARD_BYTES = 60_000


@pytest.mark.parametrize("family", ["large_lv60"], indirect=True)
def test_transformers_loads_the_shards_and_they_come_in_again_bit_identical(
    family: tuple[Config, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/interop/test_killed_conversions.py kills such an export between the shards, too."""
    config, checkpoint, one_file = family
    monkeypatch.setattr(exporting, "SHARD_BYTES", SHARD_BYTES)
    exported = export_checkpoint(checkpoint, tmp_path / "out", form="huggingface")
    shards = [load_file(path) for path in exported.files if path.suffix == ".safetensors"]
    count = len(shards)
    assert {path.name for path in exported.files if "safetensors" in path.name} == {
        "model.safetensors.index.json",
        *(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)),
    }
    assert count > 3 and not (tmp_path / "out" / "model.safetensors").exists()
    for shard in shards:
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= SHARD_BYTES
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    state = whole(open_checkpoint(checkpoint).model_tensors())
    expected = to_huggingface(state, config)
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)

    model, report = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    other = transformers.AutoModelForPreTraining.from_pretrained(one_file).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())

    import_checkpoint(tmp_path / "out", tmp_path / "in")
    again = whole(open_checkpoint(tmp_path / "in").model_tensors())
    assert again.keys() == state.keys() and all(torch.equal(again[name], tensor) for name, tensor in state.items())
