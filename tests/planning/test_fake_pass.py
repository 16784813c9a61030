"""The memory and time of passes with fake tensors are those of real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.engines import filled_model
from tests.helpers.tiers import long
from tools.bench.allocations import Allocations, storages
from w2vscale.config import Config
from w2vscale.data.inputs import Inputs
from w2vscale.engine.transforms import transform
from w2vscale.errors import UserError
from w2vscale.models.layers import compute_dtype, weights_cast_once
from w2vscale.objectives import Objective, StepContext, build_objective, load
from w2vscale.planning.fake_pass import Pass, fake_pass, noise
from w2vscale.planning.operations import Speeds, seconds_of
from w2vscale.planning.timeline import timeline, with_layers

SPEEDS = Speeds(flops=1e12, bandwidth=1e11)
DROPOUTS = ("regularization.dropout=0.1", "regularization.attention_dropout=0.1", "objective.feature_dropout=0.1")
SMALL_CTC = (
    "model.layers=2", "model.dim=128", "model.ffn_dim=512", "model.heads=4", "regularization.feature_grad_mult=1",
    "objective.freeze_encoder_updates=0",
)  # fmt: skip


def fake(config: Config, *, utterances: int, seconds: float, device: Any = "cpu") -> Pass:
    return fake_pass(config, utterances=utterances, seconds=seconds, device=device, speeds=SPEEDS)


def peak(found: Pass) -> float:
    return max(moment.live for moment in found.moments)


def real_peak(config: Config, inputs: Inputs) -> int:
    """The most bytes that PyTorch allocates for a forward and backward, beside weights and gradients."""
    objective, model = build_objective(config), filled_model(config).train()
    transform(model, config.engine, compiled=False)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda owner: setattr(owner, "grad", None))
    allocations = Allocations(torch.device("cpu"))
    with weights_cast_once(model, compute_dtype(config.precision)), allocations, allocations.phase("both"):
        forward(objective, model, inputs).total.backward()
    return allocations.peaks["both"]


def forward(objective: Objective, model: Any, inputs: Inputs) -> Any:
    return objective.forward(model, inputs, step=StepContext(0, 0, (0,), worst_case=True), training=True)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("tiny", ()),
        ("tiny", DROPOUTS),
        ("tiny", ("precision.compute=bf16",)),
        ("tiny", ("engine.activation_checkpointing=features",)),
        ("tiny", (*DROPOUTS, "engine.activation_checkpointing=selective")),
        ("tiny", ("engine.activation_checkpointing=full", "precision.compute=bf16")),
        ("best_rq_tiny", ()),
        ("ctc_1h", (*SMALL_CTC, "precision.compute=fp32")),
    ],
)
def test_the_peak_is_what_pytorch_allocates(preset: str, settings: tuple[str, ...]) -> None:
    config, objective = load(preset, settings, new=False)
    inputs = noise(objective, utterances=2, seconds=3.0)
    found = fake(config, utterances=2, seconds=3.0)
    assert peak(found) == pytest.approx(real_peak(config, inputs), rel=0.03)


def test_what_a_forward_saves_is_there_when_the_backward_begins() -> None:
    config, objective = load("tiny")
    model = filled_model(config).train()
    weights, saved = storages(model.parameters()), dict[int, int]()

    def save(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        sums = forward(objective, model, noise(objective, utterances=2, seconds=3.0))
    size = sum(number for address, number in saved.items() if address not in weights)
    first = next(moment for moment in fake(config, utterances=2, seconds=3.0).moments if moment.backward)
    assert 0.97 * size < first.live < 1.1 * size and sums.total.isfinite()


def test_flash_attention_of_a_gpu_saves_no_weights_of_frames_and_dropout_saves_a_byte() -> None:
    """Attention weights of 4 heads take 4 · 2 · T² bytes of an utterance and block, T = 499 for 10 s."""
    config, _ = load("tiny", ["precision.compute=bf16", *DROPOUTS])
    on_cpu, on_gpu = (peak(fake(config, utterances=2, seconds=10.0, device=device)) for device in ("cpu", "cuda"))
    assert on_cpu - on_gpu > 2 * config.model.layers * 4 * 2 * 499**2
    without, _ = load("tiny", ["precision.compute=bf16"])
    added = on_gpu - peak(fake(without, utterances=2, seconds=10.0, device="cuda"))
    frames, model = 2 * 499, config.model
    # Block outputs and masks: two dropouts per block and one of the embeddings; where there is none, their input is
    # what the next sum reads, and nothing is kept.
    assert added >= frames * model.dim * (2 * model.layers + 1)


def test_every_gradient_arrives_once() -> None:
    config, objective = load("tiny")
    found = fake(config, utterances=1, seconds=2.0)
    wanted = sum(parameter.numel() for parameter in objective.build_model().parameters())
    assert sum(moment.gradient for moment in found.moments) == wanted
    assert all(moment.gradient == 0 for moment in found.moments if not moment.backward)
    units = [moment.unit for moment in found.moments if moment.backward and 2 <= moment.unit < 6]
    assert units == sorted(units, reverse=True)  # from the last block to the first


@pytest.mark.parametrize(
    ("choice", "layers"), [("none", 5), ("selective", 5), ("selective", 6), long("features", 6), long("full", 6)]
)
def test_a_deep_model_is_extended_from_shallow_ones(choice: str, layers: int) -> None:
    config, _ = load("tiny", [f"engine.activation_checkpointing={choice}", f"model.layers={layers}"])
    line = timeline(config, seconds=2.0, device="cuda", speeds=SPEEDS)
    whole = fake(config, utterances=5, seconds=2.0, device="cuda")
    assert line.unit.tolist() == [moment.unit for moment in whole.moments]
    assert line.gradient.tolist() == [moment.gradient for moment in whole.moments]
    assert line.backward.tolist() == [moment.backward for moment in whole.moments]
    assert line.live(5).max() == pytest.approx(peak(whole), rel=0.01)
    assert line.forward_seconds(5) == pytest.approx(whole.forward, rel=0.01)
    assert line.backward_seconds(5) == pytest.approx(whole.backward, rel=0.01)


def test_recomputation_saves_memory_and_costs_time() -> None:
    config, _ = load("tiny", ["model.layers=6"])
    passes = {}
    for choice in ("none", "features", "selective", "full"):
        engine = config.engine.model_copy(update={"activation_checkpointing": choice})
        passes[choice] = fake(config.model_copy(update={"engine": engine}), utterances=2, seconds=4.0, device="cuda")
    peaks, times = [peak(each) for each in passes.values()], [each.forward + each.backward for each in passes.values()]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.7 * peaks[0]
    assert times == sorted(times) and times[-1] < 4 / 3 * times[0] + 1e-9


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    a, b = torch.empty(8, 4, dtype=torch.bfloat16), torch.empty(4, 16, dtype=torch.bfloat16)
    assert seconds_of(2 * 8 * 4 * 16, [a, b], Speeds(flops=1.0, bandwidth=1e9)) == 1024
    assert seconds_of(2 * 8 * 4 * 16, [a, b], Speeds(flops=1e9, bandwidth=2.0)) == 32 + 64
    assert seconds_of(30.0, [a.float()], Speeds(flops=1.0, bandwidth=1e9)) == pytest.approx(450)  # a 15th of the rate


def test_an_objective_that_reads_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, objective = load("tiny")
    monkeypatch.setattr(
        type(objective), "draws", lambda self, inputs, step: {"temperature": float(inputs.masked_B.sum())}
    )
    with pytest.raises(UserError, match=r"objective.name=wav2vec2: its memory cannot be predicted") as caught:
        fake(with_layers(config, 1), utterances=1, seconds=2.0)
    assert "\n" not in str(caught.value)
