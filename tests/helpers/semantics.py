"""Models with everything that an `nn.Module` may hold beside trained parameters, and updates of them on any engine."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from tests.helpers.engines import Setup, exported, set_up
from tests.helpers.micro import MICRO_RUN
from w2vscale.checkpoint.format import TrainState
from w2vscale.checkpoint.reader import open_checkpoint
from w2vscale.checkpoint.store import CheckpointStore
from w2vscale.config import load_config
from w2vscale.distributed.process_group import Ranks, sum_over_ranks
from w2vscale.errors import UserError
from w2vscale.models.wav2vec2 import EncoderOutput
from w2vscale.objectives import OBJECTIVES
from w2vscale.objectives.base import empty_model
from w2vscale.objectives.contrastive import Contrastive, ContrastiveSums, Wav2Vec2ForPretraining
from w2vscale.optim.canonical import expected_tensors

DECAY = 0.9
"""Of the EMA teacher."""

LR = 1e-2
SETTINGS = (
    "data.max_seconds=1",
    "batch.max_seconds=2",
    "regularization.layerdrop=0.3",
    "optim.weight_decay=0.5",
    "trainer.updates=9",
)


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d that computes in fp32, whatever the type of its input and of gathered weights."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x.float(), self.running_mean, self.running_var, self.weight.float(), self.bias.float(),
            self.training, 0.1, self.eps,
        )  # fmt: skip


class Extras(nn.Module):
    """Persistent and non-persistent buffers, a BatchNorm, and a frozen matrix that weight decay would change."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Values that bf16 cannot hold, and a type that is not floating-point.
        self.register_buffer("scale", torch.linspace(0.7, 1.3, channels))
        self.register_buffer("order", torch.arange(channels).flip(0))
        self.register_buffer("offset", torch.linspace(-0.1, 0.1, channels), persistent=False)
        self.norm = BatchNorm(channels)
        self.frozen = nn.Parameter(torch.empty(channels, channels), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.frozen, std=0.1)

    def forward(self, x_BTC: Tensor) -> Tensor:
        scaled_BTC = x_BTC.float()[..., self.order] * self.scale + self.offset
        normalised_BTC = self.norm(scaled_BTC.flatten(0, 1)).view_as(scaled_BTC)
        return (normalised_BTC + normalised_BTC @ self.frozen.float()).to(x_BTC.dtype)


class ModelWithExtras(Wav2Vec2ForPretraining):
    """The input of the quantizer passes through `Extras`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.extras = Extras(self.quantizer.projection.in_features)

    def quantizer_inputs(self, encoded: EncoderOutput) -> Tensor:
        return self.extras(super().quantizer_inputs(encoded))


class WithExtras(Contrastive):
    """An objective whose model has buffers, a BatchNorm and a frozen parameter."""

    def build_model(self) -> ModelWithExtras:
        return ModelWithExtras(self.model, self.regularization, self.settings, self.compute_dtype)


class ModelWithTeacher(Wav2Vec2ForPretraining):
    """The context also predicts that of a frozen copy of the encoder."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, inputs: Any, **options: Any) -> ContrastiveSums:
        found: list[EncoderOutput] = []
        handle = self.encoder.register_forward_hook(lambda module, given, output: found.append(output))
        try:
            sums = super().forward(inputs, **options)
        finally:
            handle.remove()
        with torch.no_grad():
            target = self.teacher(inputs.audio.waveforms_BS.to(self.compute_dtype), inputs.audio.lengths)
        distance = F.mse_loss(found[0].context_BTD.float(), target.context_BTD.float())
        return sums._replace(total=sums.total + sum(inputs.masked) * distance)


class WithTeacher(Contrastive):
    """An objective with a teacher that is the exponential moving average (EMA) of the encoder."""

    def build_model(self) -> ModelWithTeacher:
        return ModelWithTeacher(self.model, self.regularization, self.settings, self.compute_dtype)

    def after_step(self, module: Any, update: int) -> None:
        pairs = zip(module.teacher.parameters(), module.encoder.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.mul_(DECAY).add_(student, alpha=1.0 - DECAY)


class Updates(NamedTuple):
    """What some updates did, on one rank."""

    losses: list[float]  # of each update, over all ranks
    states: list[dict[str, Tensor]]  # whole, before the first update and after each
    buffers: list[dict[str, Tensor]]  # of this rank, non-persistent ones included, at the same times

    def packed(self) -> bytes:
        """To be sent to another process: a tensor by itself would take a file descriptor each."""
        file = io.BytesIO()
        torch.save(tuple(self), file)
        return file.getvalue()

    @classmethod
    def unpacked(cls, contents: bytes) -> Updates:
        """The inverse of `packed`."""
        return cls(*torch.load(io.BytesIO(contents), weights_only=True))


@contextmanager
def built(kind: type[Contrastive], corpus: str, overrides: tuple[str, ...]) -> Iterator[Setup]:
    """The engine of the micro model with another objective, with initial values."""
    config = load_config("base", [*MICRO_RUN, *SETTINGS, f"data.train={corpus}", *overrides])
    with patch.dict(OBJECTIVES, {"wav2vec2": kind}):
        setup = set_up(config)
        yield setup
        setup.engine.close()


def ranks() -> Ranks:
    """This process among all."""
    return Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


def whole_state(setup: Setup) -> dict[str, Tensor]:
    """The exported state with whole tensors in memory of their own."""
    state = exported(setup.engine)
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in state.items()}


def buffers_of(setup: Setup) -> dict[str, Tensor]:
    """Every buffer of the engine's model."""
    engine: Any = setup.engine
    return {name: buffer.clone() for name, buffer in engine.buffers.model.named_buffers()}


def run_updates(setup: Setup, updates: range) -> Updates:
    """Take some updates."""
    mine, config = ranks(), setup.config
    found = Updates([], [whole_state(setup)], [buffers_of(setup)])
    windows = setup.training_set.windows(
        updates, micro_batches=config.batch.micro_batches, rank=mine.rank, world_size=mine.world_size
    )
    for update, window in zip(updates, windows, strict=True):
        (weight,) = sum_over_ranks([sum(batch.weight for batch in window)])
        sums = setup.window(window, weight, update=update)
        setup.step(LR, update=update)
        found.losses.append(sum_over_ranks([float(sums.total)])[0] / weight)
        found.states.append(whole_state(setup))
        found.buffers.append(buffers_of(setup))
    return found


def updates_with(
    kind: type[Contrastive], corpus: str, overrides: tuple[str, ...], updates: int, save_to: str | None = None
) -> bytes:
    """The first updates of a run, packed; with `save_to`, a checkpoint is written there after the third."""
    with built(kind, corpus, overrides) as setup:
        found = run_updates(setup, range(min(3, updates)))
        if save_to is not None:
            expected = expected_tensors(empty_model(setup.objective))
            store = CheckpointStore(Path(save_to), ranks(), expected=expected)
            store.save(setup.engine.export_state(), TrainState(update=3), "{}")
        if updates > 3:
            more = run_updates(setup, range(3, updates))
            found = Updates(
                found.losses + more.losses, found.states + more.states[1:], found.buffers + more.buffers[1:]
            )
        return found.packed()


def resumed_with(kind: type[Contrastive], corpus: str, overrides: tuple[str, ...], folder: str, updates: int) -> bytes:
    """The updates after the third, from a checkpoint, packed. The engine has other values before."""
    with built(kind, corpus, overrides) as setup:
        setup.window([setup.training_set.largest()], 100.0)
        setup.step(LR)
        setup.engine.import_state(open_checkpoint(Path(folder)))
        return run_updates(setup, range(3, updates)).packed()


def refusal_of_a_teacher(corpus: str, overrides: tuple[str, ...]) -> str:
    """What an engine says, before it is built, to a model that is to be changed after the step."""
    try:
        with built(WithTeacher, corpus, overrides):
            return ""
    except UserError as error:
        return str(error)
