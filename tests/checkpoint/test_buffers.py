"""Buffers and frozen parameters in a checkpoint: written, read, verified, consolidated and averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader

from tests.helpers.checkpoints import change_committed
from w2vscale.checkpoint import expected, reader
from w2vscale.checkpoint.averaging import average
from w2vscale.checkpoint.consolidation import consolidate
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.lazy import whole
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.checkpoint.verification import verify
from w2vscale.config import Config, dump_config
from w2vscale.distributed.process_group import Ranks
from w2vscale.errors import UserError
from w2vscale.optim.canonical import TensorSpec, expected_tensors

MEAN, COUNT, MASK = "model.norm.running_mean", "model.norm.num_batches_tracked", "model.mask"


class Model(nn.Module):
    """BatchNorm's buffers, a codebook and a mask, one that is not persistent, and a frozen parameter."""

    codebook: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("codebook", torch.randn(2, 3, dtype=torch.float64).bfloat16())
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.zeros(7), persistent=False)


@pytest.fixture(autouse=True)
def model_with_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that settings describe, whatever they are."""

    def meta_model(config: Config) -> nn.Module:
        with torch.device("meta"):
            return Model()

    for module in (expected, reader):
        monkeypatch.setattr(module, "meta_model", meta_model)


def state(model: nn.Module, *, scale: float = 1.0) -> dict[str, Tensor]:
    """What an engine exports for this model."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors |= {f"optim.{name}.{key}": torch.full_like(parameter, scale) for key in ("exp_avg", "exp_avg_sq")}
            tensors[f"optim.{name}.step"] = torch.tensor(scale)
    return tensors


def trained(seed: int) -> Model:
    """A model whose parameters and buffers have values of their own."""
    torch.manual_seed(seed)
    model = Model()
    model.norm(torch.randn(8, 3) * seed + seed)
    model.norm.num_batches_tracked.fill_(2**53 + seed)  # no floating-point type holds it
    return model


def save(run: Path, update: int, tensors: dict[str, Tensor], loss: float | None = None) -> Path:
    store = CheckpointStore(run / "checkpoints", Ranks(), expected=expected_tensors(Model()), keep_last=9)
    return store.save(
        tensors, TrainState(update=update, validation={} if loss is None else {"loss": loss}), dump_config(Config())
    )


def test_what_is_expected() -> None:
    specs = expected_tensors(Model())
    assert [name for name in specs if name.startswith("model.")] == [f"model.{name}" for name in Model().state_dict()]
    assert {name.removeprefix("optim.").rpartition(".")[0] for name in specs if name.startswith("optim.")} == {
        "linear.weight", "linear.bias", "norm.weight", "norm.bias",
    }  # fmt: skip
    assert specs["optim.linear.weight.exp_avg"] == TensorSpec((3, 4), torch.float32)
    assert specs["optim.linear.weight.step"] == TensorSpec((), torch.float32)
    assert specs["model.codebook"] == TensorSpec((2, 3), torch.float32)
    assert specs[COUNT] == TensorSpec((), torch.int64)
    assert specs[MASK] == TensorSpec((3,), torch.bool)
    assert expected_tensors(Model(), optimizer=False) == {n: s for n, s in specs.items() if n.startswith("model.")}


def test_a_tied_parameter_is_expected_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert [*expected_tensors(model, optimizer=False)] == ["model.0.weight"]


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    model = trained(3)
    path = save(tmp_path, 1, state(model))
    checkpoint = open_checkpoint(tmp_path, resuming=True)
    assert checkpoint.specs == expected_tensors(model)
    into = {name: torch.zeros_like(tensor) for name, tensor in state(model).items()}
    checkpoint.read_into(into)
    for name, tensor in state(model).items():
        for found in (into[name], checkpoint.tensor(name)):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    other = Model()
    checkpoint.load_model(other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert verify(path).problems == []


def test_torch_reads_it_too(tmp_path: Path) -> None:
    """The files are those of torch Distributed Checkpoint."""
    tensors = state(trained(3))
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    storage, planner = HuggingFaceStorageReader(str(save(tmp_path, 1, tensors))), DefaultLoadPlanner()
    metadata = storage.read_metadata()
    storage.set_up_storage_reader(metadata, is_coordinator=True)
    planner.set_up_planner(into, metadata, is_coordinator=True)
    storage.read_data(planner.create_local_plan(), planner).wait()
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())


def test_consolidation_keeps_types(tmp_path: Path) -> None:
    model = trained(3)
    save(tmp_path, 1, state(model))
    found = load_file(consolidate(tmp_path, tmp_path / "one").file)
    assert found.keys() == model.state_dict().keys()
    for name, tensor in state(model).items():
        if name.startswith("model."):
            whole = found[name.removeprefix("model.")]
            assert whole.dtype == tensor.dtype and torch.equal(whole, tensor), name


def test_buffers_are_averaged(tmp_path: Path) -> None:
    models = [trained(seed) for seed in (1, 2, 3)]
    models[2].mask.copy_(torch.tensor([False, False, True]))
    for update, (model, loss) in enumerate(zip(models, (0.1, 0.3, 0.2), strict=True), start=1):
        save(tmp_path / "run", update, state(model), loss)
    for options, chosen in (({"last": 2}, models[1:]), ({"best": 2}, models[::2])):
        output = tmp_path / next(iter(options))
        average(tmp_path / "run", output, **options)
        found = whole(open_checkpoint(output).model_tensors())
        for name, newest in chosen[-1].state_dict().items():
            if newest.is_floating_point():
                newest = (sum(model.state_dict()[name].float().double() for model in chosen) / 2).float()
            assert torch.equal(found[name], newest), name
        assert found["norm.num_batches_tracked"] == 2**53 + 3
        assert verify(output).problems == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({MEAN: None}, f"{MEAN}: missing"),
        ({COUNT: torch.tensor(1.0)}, f"{COUNT}: has the type float32, expected int64"),
        ({MASK: torch.ones(3, dtype=torch.uint8)}, f"{MASK}: has the type uint8, expected bool"),
        ({MEAN: torch.zeros(3, dtype=torch.float64)}, f"{MEAN}: has the type float64, expected float32"),
        (
            {"optim.frozen.step": torch.tensor(1.0)},
            "optim.frozen.step: not a tensor of the model or its optimizer",
        ),
    ],
)
def test_what_is_not_expected_is_not_committed(tmp_path: Path, change: dict[str, Tensor | None], problem: str) -> None:
    save(tmp_path, 1, state(trained(1)))
    tensors = {name: tensor for name, tensor in (state(trained(1)) | change).items() if tensor is not None}
    with pytest.raises(UserError, match=rf"update_00000002: not committed: .*: {problem}; earlier checkpoints are"):
        save(tmp_path, 2, tensors)
    assert open_checkpoint(tmp_path).state.update == 1


def lose_buffer(tensors: dict[str, Tensor], offsets: dict[str, list[int]]) -> None:
    del tensors[MEAN]


def change_type(tensors: dict[str, Tensor], offsets: dict[str, list[int]]) -> None:
    tensors[COUNT] = tensors[COUNT].float()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lose_buffer, f"{MEAN}: missing"),
        (change_type, f"{COUNT}: has the type float32, expected int64"),
    ],
)
def test_a_checkpoint_with_another_buffer_cannot_be_used(tmp_path: Path, change, problem: str) -> None:
    path = save(tmp_path, 1, state(trained(1)))
    change_committed(path, change)
    assert verify(path).problems == [problem]
    checkpoint = open_checkpoint(path)
    for use in (
        lambda: open_checkpoint(path, resuming=True),
        lambda: consolidate(path, tmp_path / "one"),
        lambda: average(tmp_path, tmp_path / "mean", last=1),
        lambda: checkpoint.load_model(Model()),
        lambda: checkpoint.read_into(state(trained(2))),
        checkpoint.model_tensors,
    ):
        with pytest.raises(UserError, match=problem) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_run_with_a_frozen_parameter_can_be_resumed_without_its_state(tmp_path: Path) -> None:
    """The settings of the checkpoint say which parameters are trained, not the names in it."""
    path = save(tmp_path, 1, state(trained(1)))
    assert open_checkpoint(path, resuming=True).state.update == 1
    change_committed(path, lambda tensors, offsets: [tensors.pop(n) for n in [*tensors] if "optim.linear.bias" in n])
    with pytest.raises(UserError, match=r"3 tensors of 1 parameter are missing, e\.g\. optim\.linear"):
        open_checkpoint(path, resuming=True)
