"""Conversions hold a few tensors at a time, not the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.conversions import CONVERSIONS, peak_of_conversion
from tests.helpers.exported import random_model, save_model
from tests.helpers.fairseq import BASE, Shape, all_settings, fairseq_state, save_new
from tests.helpers.memory import MIB
from w2vscale.checkpoint.format import TrainState, folder_name
from w2vscale.config import load_config
from w2vscale.interop.exporting import export_checkpoint

pytestmark = pytest.mark.long

LAYERS = 7
LARGEST = 3072 * 768 * 4  # bytes: the matrices of the feed-forward networks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with two checkpoints of a model of 200 MB, its exports, and a model of fairseq of the same size."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config("base", [f"model.layers={LAYERS}", "model.positional_kernel=16"])
    state = random_model(config, seed=1, biases_only=True).state_dict()
    assert max(tensor.nbytes for tensor in state.values()) == LARGEST
    assert sum(tensor.nbytes for tensor in state.values()) > 190 * MIB
    save_model(folder, config, state, TrainState(update=1))
    second = save_model(folder / "second", config, state, TrainState(update=2))
    second.rename(folder / "checkpoints" / folder_name(2))
    for form in ("huggingface", "fairseq2"):
        export_checkpoint(folder, folder / form, form=form)
    with torch.no_grad():
        shape = Shape(**{**BASE.__dict__, "layers": LAYERS, "kernel": 16})
        save_new(folder / "fairseq.pt", fairseq_state(shape), all_settings(shape))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_memory_of_a_conversion_is_that_of_a_few_tensors(name: str, run: Path, tmp_path: Path) -> None:
    peak = peak_of_conversion(name, run, tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.*")) > 150 * MIB
    shutil.rmtree(tmp_path / "out")
    assert 0 < peak < (10 if name == "average" else 4) * LARGEST  # sums are in float64
