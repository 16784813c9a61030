"""One reader: every header is read once, and every rank reads its own part of each tensor."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.test_verification import content, seal, spread
from tests.helpers.micro import MICRO_MODEL
from w2vscale.checkpoint import slices
from w2vscale.checkpoint.averaging import average
from w2vscale.checkpoint.consolidation import consolidate
from w2vscale.checkpoint.reader import CheckpointReader, open_checkpoint
from w2vscale.checkpoint.verification import verify
from w2vscale.config import load_config
from w2vscale.errors import UserError
from w2vscale.inference.pretrained import load
from w2vscale.interop.exporting import export_checkpoint
from w2vscale.objectives import build_objective
from w2vscale.training.warm_start import open_source

CONFIG = load_config("base", MICRO_MODEL)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint in three files."""
    return spread(tmp_path / "run" / "checkpoints" / "update_00000003", content())


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often the header of each file is read, by whatever opens it."""
    counts: Counter[Path] = Counter()
    opening = slices.safe_open

    def counted(file: Path, **settings: Any) -> Any:
        counts[Path(file)] += 1
        return opening(file, **settings)

    monkeypatch.setattr(slices, "safe_open", counted)
    monkeypatch.setattr("safetensors.safe_open", counted)  # what torch Distributed Checkpoint would use
    return counts


@pytest.mark.parametrize(
    "use",
    [
        lambda path, output: export_checkpoint(path, output, form="huggingface"),
        lambda path, output: consolidate(path, output),
        lambda path, output: average(path.parents[1], output, last=1),
        lambda path, output: verify(path),
        lambda path, output: load(path, device="cpu"),
        lambda path, output: open_source(path).tensors["encoder.mask_embedding"].whole(),
        lambda path, output: open_checkpoint(path, resuming=True).read_into(content()),
    ],
    ids=["export", "consolidate", "average", "verify", "load", "warm start", "resume"],
)
def test_each_header_is_read_once(
    path: Path, tmp_path: Path, headers: Counter[Path], use: Callable[[Path, Path], object]
) -> None:
    use(path, tmp_path / "output")
    read = {file: count for file, count in headers.items() if file.parent == path}
    assert read == dict.fromkeys(path.glob("*.safetensors"), 1)


def test_settings_are_read_when_they_are_asked_for(path: Path) -> None:
    (path / "config.yaml").write_text("medel: {}\n")
    seal(path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensor("model.encoder.mask_embedding").shape == (32,)
    with pytest.raises(UserError, match="medel"):
        _ = checkpoint.config


def test_a_tensor_has_memory_of_its_own(path: Path) -> None:
    """It outlives the files, and what is done to it does not show in them."""
    name = "model.encoder.mask_embedding"
    checkpoint = open_checkpoint(path)
    checkpoint.tensor(name).zero_()
    assert torch.equal(checkpoint.tensor(name), content()[name])


def test_it_can_be_sent_to_other_ranks(path: Path, headers: Counter[Path]) -> None:
    found = open_checkpoint(path)
    headers.clear()
    sent: CheckpointReader = pickle.loads(pickle.dumps(found))
    assert not headers
    assert sent.state == found.state and sent.specs == found.specs
    assert torch.equal(sent.tensor("model.encoder.mask_embedding"), content()["model.encoder.mask_embedding"])


def test_only_the_model_is_read_into_a_model(path: Path) -> None:
    model = build_objective(CONFIG).build_model()
    open_checkpoint(path).load_model(model)
    assert all(torch.equal(tensor, content()[f"model.{name}"]) for name, tensor in model.state_dict().items())


def test_part_of_a_state_can_be_read(path: Path) -> None:
    state: dict[str, Tensor] = {"optim.quantizer.projection.bias.exp_avg": torch.zeros(32)}
    open_checkpoint(path).read_into(state)
    assert all(torch.equal(tensor, content()[name]) for name, tensor in state.items())
