"""What an objective is: everything that differs between wav2vec 2.0 pretraining, CTC fine-tuning and any other loss.

Engine, loader, loop, evaluation, export and report ask an objective and never test which one it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor, nn

from w2vscale.config import Config, ModelConfig, RegularizationConfig, Section
from w2vscale.data.inputs import Inputs, Utterance
from w2vscale.data.randomness import Stream, derived_seed, generator
from w2vscale.errors import UserError
from w2vscale.models.wav2vec2 import EncoderOutput


class Sums(Protocol):
    """Sums over micro-batches: a NamedTuple of tensors. `total` is what is differentiated, the others are detached."""

    @property
    def total(self) -> Tensor:
        """The summed loss in nats; divide it by the sum of weights."""

    def __iter__(self) -> Any: ...


def add_sums(one: Any, other: Any) -> Any:
    """Sums over both."""
    return type(one)(*(a + b for a, b in zip(one, other, strict=True)))


@dataclass(frozen=True)
class StepContext:
    """Which forward this is: all of its randomness follows from here.

    Args:
        seed: of the run.
        update: number of the update, from 0.
        numbers: the micro-batches that share the forward.
        worst_case: compute and train every layer, as the update does that needs the most memory.
    """

    seed: int
    update: int
    numbers: tuple[int, ...] = ()
    worst_case: bool = False

    def seed_dropout(self) -> None:
        """Seed PyTorch's default generators, which dropout draws from."""
        torch.manual_seed(derived_seed(self.seed, Stream.DROPOUT, self.numbers[0]))

    def generators(self, stream: Stream, device: torch.device) -> list[torch.Generator]:
        """A generator on `device` for each micro-batch of the forward."""
        return [torch.Generator(device).manual_seed(derived_seed(self.seed, stream, one)) for one in self.numbers]

    def active_layers(self, layers: int, layerdrop: float) -> list[bool] | None:
        """Which transformer blocks the update computes (LayerDrop, Fan et al. 2019); None: all.

        The same on all ranks and in all forwards of an update.
        """
        if layerdrop == 0.0 or self.worst_case:
            return None
        return list(generator(self.seed, Stream.LAYERDROP, self.update).random(layers) >= layerdrop)


class ObjectiveSettings(Section):
    """Settings of an objective: the section `objective`."""

    name: str


class Target(NamedTuple):
    """What an objective learns from an utterance beside its audio, and a note for the log of bad audio, if any."""

    value: Any = None
    note: tuple[str, str] | None = None  # kind, reason


@dataclass(frozen=True)
class Panel:
    """One plot of a report.

    Args:
        title: a word for the heading of a column.
        label: of the vertical axis, with its unit.
        keys: metrics that are drawn, with a name for each; "" for a single one.
        chance: value of a model that guesses.
        training: whether the metric exists in training too, not in validation alone.
    """

    title: str
    label: str
    keys: Mapping[str, str]
    chance: float | None = None
    training: bool = True


@dataclass(frozen=True)
class TransformersHead:
    """How Hugging Face Transformers names what an objective adds to the encoder.

    Args:
        architecture: class of the model.
        tensors: our names of modules and tensors: theirs (see `interop/names.py`).
        settings: entries of config.json.
        files: contents of further JSON files.
    """

    architecture: str = "Wav2Vec2Model"
    tensors: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Objective(ABC):
    """One training objective, built from the settings of a run.

    A model has a module `encoder` (`models.wav2vec2.Wav2Vec2Encoder`), and computes in `compute_dtype`.
    """

    Settings: ClassVar[type[ObjectiveSettings]]
    crops: ClassVar[bool] = True
    """Whether an utterance may be cropped. Otherwise longer ones are left out."""

    vocabulary: Sequence[str] = ()
    """Symbols of the output layer, the blank of CTC first; empty where the model writes no text."""

    code_entries = 0
    """Entries of each codebook that `codes` chooses from; 0 where the model has no codes."""

    def __init__(
        self, settings: Any, model: ModelConfig, regularization: RegularizationConfig, compute_dtype: torch.dtype
    ) -> None:
        self.settings = settings
        self.model = model
        self.regularization = regularization
        self.compute_dtype = compute_dtype

    @property
    @abstractmethod
    def shortest_frames(self) -> int:
        """Frames of the shortest utterance that can be learned from."""

    def check(self, config: Config) -> None:  # noqa: B027 - most objectives have nothing to refuse
        """Refuse settings of a training run that do not go together.

        Raises:
            UserError: names the setting.
        """

    def unfrozen(self) -> ObjectiveSettings:
        """The settings, but every parameter learns from the first update on."""
        settings: ObjectiveSettings = self.settings
        return settings

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Encoder and heads."""

    @property
    def skips_parameters(self) -> bool:
        """Whether some updates leave parameters without a gradient."""
        return self.regularization.layerdrop > 0.0

    def read_target(self, cut: Cut, *, samples: int) -> Target:
        """What is learned from an utterance of `samples` samples beside its audio. Runs in a loader process.

        Raises:
            AudioError: nothing can be learned from it.
        """
        return Target()

    @abstractmethod
    def make_inputs(
        self, utterances: Sequence[Utterance], *, rng: Callable[[int], np.random.Generator], width: int = 0
    ) -> Inputs:
        """Pad a micro-batch to at least `width` samples, and draw all that is drawn for it. Runs in a loader process.

        `rng(place)` gives the generator of one utterance. Without any utterance the result is one of silence that can
        be computed and has no weight.
        """

    @abstractmethod
    def forward(self, module: nn.Module, inputs: Any, *, step: StepContext, training: bool) -> Sums:
        """Sums over the micro-batches in `inputs`, on this rank.

        `module` is the model or what an engine wraps around it. Without `training` nothing is random.
        """

    def after_step(self, module: nn.Module, update: int) -> None:  # noqa: B027 - most objectives change nothing
        """Change the model after the optimizer step of update `update`, e.g. an EMA teacher."""

    @abstractmethod
    def metrics(self, sums: Any) -> dict[str, float]:
        """Metrics from sums over all ranks. `loss` is in nats per unit of weight."""

    def scheduled(self, update: int) -> dict[str, float]:
        """Values that follow from the update alone, beside the learning rate."""
        return {}

    @abstractmethod
    def line(self, metrics: Mapping[str, float]) -> str:
        """The metrics in a log line."""

    @abstractmethod
    def table(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The metrics of an evaluation by name, formatted with their units."""

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """What is wrong with a run that has these metrics in a log line."""
        return []

    @abstractmethod
    def panels(self) -> tuple[Panel, Panel, Panel]:
        """What a report plots: the loss, its most telling metric, and one more."""

    def codes(self, module: nn.Module, encoded: EncoderOutput) -> Tensor | None:
        """The discrete code of each frame by codebook, [B, T, G], where the model has any."""
        return None

    def logits(self, module: Any, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V] from the output of the last transformer block.

        Raises:
            UserError: the model writes no text.
        """
        raise UserError(
            f"objective.name={self.settings.name}: the checkpoint has no output layer for text; "
            "fine-tune it first: w2vscale finetune"
        )

    def transformers_head(self) -> TransformersHead:
        """What Transformers calls the parts beside the encoder; by default nothing of them is exported."""
        return TransformersHead()
