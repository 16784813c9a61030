"""A window asks a GPU for no value, so that the host runs ahead of it.

On the meta device, where nothing has a value, whatever needs one fails: `item`, `nonzero`, masks as indices, copies to
the host. The code is the GPU's: it asks whether a device is a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from w2vscale.objectives.criterion import PretrainingCriterion

from tests.helpers.micro import MICRO_MODEL
from w2vscale.config import Config, load_config
from w2vscale.data.inputs import CtcInputs, concatenate, to_device
from w2vscale.data.micro_batch import MicroBatch, make_inputs
from w2vscale.engine import build_engine
from w2vscale.objectives.ctc import Wav2Vec2ForCTC
from w2vscale.training.run import empty_model, initial_values


def micro_batch(config: Config, lengths: Sequence[int], number: int) -> MicroBatch:
    draws = np.random.default_rng(number)
    waveforms = [draws.standard_normal(length, dtype=np.float32) for length in lengths]
    inputs = make_inputs(waveforms, range(len(lengths)), number=number, seed=0, config=config.model)
    return MicroBatch(update=0, number=number, inputs=inputs, audio_samples=sum(lengths))


class CopiesToTheDevice(TorchDispatchMode):
    """Counts operations on tensors of the host beside those of the device: each would be a copy that is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.device.type == "cpu" and x.dim() > 0 for x in given):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["base", "large_lv60"])
@pytest.mark.parametrize("lengths", [[(16_000, 12_000), (9_000,)], [(16_000, 16_000)]], ids=["padded", "not padded"])
def test_forward_and_backward_need_no_value(preset: str, lengths: list[tuple[int, ...]]) -> None:
    config = load_config(preset, [*MICRO_MODEL, "precision.compute=bf16"])
    model = empty_model(config).train()
    device = torch.device("meta")
    batches = [micro_batch(config, some, number) for number, some in enumerate(lengths)]
    inputs = concatenate([to_device(batch.inputs, device) for batch in batches])
    shape = (sum(batch.weight for batch in batches), config.objective.codebooks, config.objective.codebook_entries)
    with CopiesToTheDevice() as copies:
        sums = model(inputs, noise_MGV=torch.empty(shape, device=device), temperature=2.0, active=[True, False, True])
        (sums.total * (1.0 / torch.tensor(3.0))).backward()
    assert copies.found == []
    assert all(field.device.type == "meta" for field in sums)


def test_fine_tuning_needs_no_value() -> None:
    config = load_config(
        "base", [*MICRO_MODEL, "objective.name=ctc", "objective.vocabulary=letters", "precision.compute=bf16"]
    )
    with torch.device("meta"):
        model = Wav2Vec2ForCTC(config.model, config.ctc, torch.bfloat16).train()
        inputs = CtcInputs(
            waveforms_BS=torch.empty(2, 16_000),
            lengths_B=torch.empty(2, dtype=torch.long),
            frames_B=torch.empty(2, dtype=torch.long),
            mask_BT=torch.empty(2, 49, dtype=torch.bool),
            channel_mask_BD=torch.empty(2, 32, dtype=torch.bool),
            labels_L=torch.empty(9, dtype=torch.long),
            label_lengths_B=torch.empty(2, dtype=torch.long),
            utterances=(2,),
            labels=(9,),
            padded=True,
        )
        encoded = model.encoder(inputs.waveforms_BS, inputs.lengths_B, inputs.frames_B, inputs.mask_BT)
        model.head(encoded.context_BTD).sum().backward()


@pytest.mark.cuda
def test_a_window_on_a_gpu_waits_for_nothing() -> None:
    config = load_config("base", [*MICRO_MODEL, "precision.compute=bf16"])
    device = torch.device("cuda", torch.cuda.current_device())
    engine = build_engine(empty_model(config), PretrainingCriterion(config.model, seed=0), config, device)
    engine.import_parameters(initial_values(config))
    window = [micro_batch(config, (16_000, 12_000), number).pin_memory() for number in range(2)]
    first = engine.run_window(window, torch.tensor(1.0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = engine.run_window(window, torch.tensor(1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(second.total) == pytest.approx(float(first.total), rel=1e-3)
