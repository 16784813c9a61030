"""The interface of an objective: all that differs between wav2vec 2.0 pretraining, CTC fine-tuning and other losses.

Engine, loader, loop, evaluation, export and report use only this interface and never test which objective they have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from w2vscale.config import Config, HealthConfig, ModelConfig, RegularizationConfig
from w2vscale.data.inputs import Inputs, Utterance
from w2vscale.data.randomness import Generators, Stream, derived_seed, generator
from w2vscale.errors import UserError
from w2vscale.models.initialisation import empty_parameters, initial_values
from w2vscale.models.wav2vec2 import EncoderOutput
from w2vscale.objectives.details import Details
from w2vscale.objectives.settings import ObjectiveSettings

if TYPE_CHECKING:
    from lhotse.cut import Cut


class Sums(Protocol):
    """Sums over micro-batches: a NamedTuple of tensors. Only `total` has a gradient; the others are detached."""

    @property
    def total(self) -> Tensor:
        """Loss in nats, summed over the micro-batches. Divide it by the sum of their weights."""

    def __iter__(self) -> Any: ...


def add_sums(one: Any, other: Any) -> Any:
    """Add two sums of the same type field by field."""
    return type(one)(*(a + b for a, b in zip(one, other, strict=True)))


@dataclass(frozen=True)
class StepContext:
    """Identifies a forward. All of its randomness is a function of these values."""

    seed: int  # of the run
    update: int  # from 0
    numbers: tuple[int, ...] = ()  # numbers of the micro-batches that share the forward
    worst_case: bool = False  # compute and train every layer, to measure the largest memory use

    def seed_dropout(self) -> None:
        """Seed the default generators of PyTorch, which dropout uses."""
        torch.manual_seed(derived_seed(self.seed, Stream.DROPOUT, self.numbers[0]))

    def generators(self, stream: Stream, device: torch.device) -> list[torch.Generator]:
        """Create a generator on `device` for each micro-batch of the forward."""
        return [torch.Generator(device).manual_seed(derived_seed(self.seed, stream, one)) for one in self.numbers]

    def active_layers(self, layers: int, layerdrop: float) -> list[bool] | None:
        """Draw which transformer blocks this update computes (LayerDrop, Fan et al. 2019). None means all.

        The result is the same on all ranks and in all forwards of an update.
        """
        if layerdrop == 0.0 or self.worst_case:
            return None
        return list(generator(self.seed, Stream.LAYERDROP, self.update).random(layers) >= layerdrop)


class Target(NamedTuple):
    """The target of an utterance (e.g. its labels), and a note for the log of bad audio, if any."""

    value: Any = None
    note: tuple[str, str] | None = None  # kind, reason


class Finding(NamedTuple):
    """Trouble that a log line shows. docs/health.md describes each kind."""

    kind: Literal["collapse", "chance", "spike", "norm", "solved"]
    text: str  # one line: what is seen, the threshold, and what to do


@dataclass(frozen=True)
class Published:
    """A curve that somebody has published, to compare with."""

    name: str
    values: Mapping[int, float]  # by update
    source: str  # who measured it, and on what
    url: str
    caveat: str  # what has to be equal, so that a run can be compared with it


@dataclass(frozen=True)
class Panel:
    """One plot of a report. Runs share it if their objectives give it the same title."""

    title: str  # short, for the heading of a table column
    label: str  # of the vertical axis, with the unit
    keys: Mapping[str, str]  # metrics to plot, with a name for each in the legend; "" for a single one
    chance: float | None = None  # value at chance level, if there is one
    training: bool = True  # whether the metric exists in training as well as in validation
    percent: bool = False  # whether a report shows the values in percent
    published: Published | None = None


@dataclass(frozen=True)
class TransformersHead:
    """The Hugging Face Transformers equivalent of the heads that an objective adds to the encoder."""

    architecture: str = "Wav2Vec2Model"  # name of the model class
    summary: str = (  # for the model card, in Markdown: what the model learned, with a citation
        "A speech model pretrained on audio without transcripts. It has no output layer for text: fine-tune it, or use "
        "its hidden states."
    )
    tensors: Mapping[str, str] = field(default_factory=dict)  # our name of each module or tensor, mapped to theirs
    settings: Mapping[str, Any] = field(default_factory=dict)  # entries of config.json
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # additional JSON files, by name
    note: str = ""  # for the model card: what a user of the example has to know besides


class Objective(ABC):
    """A training objective. Its model has a module `encoder` (`Wav2Vec2Encoder`) and computes in `compute_dtype`."""

    Settings: ClassVar[type[ObjectiveSettings]]
    crops: ClassVar[bool] = True  # whether to crop utterances longer than `data.max_seconds`, or to leave them out
    vocabulary: Sequence[str] = ()  # symbols of the output layer, CTC blank first; empty if it does not output text
    spaced: bool = False  # whether its text is these symbols with spaces between them, e.g. phones
    error_metrics: ClassVar[Sequence[str]] = ("loss",)  # metrics that can rank checkpoints: lower is better
    most_epochs: ClassVar[int] = 10_000  # more than that is a mistake; BASE had 650 of LibriSpeech
    updates_at_chance: ClassVar[int] = 300  # updates in which chance level is normal, also in the shortest runs
    code_entries = 0  # number of entries of each codebook; 0 if the model has no discrete codes

    def __init__(
        self, settings: Any, model: ModelConfig, regularization: RegularizationConfig, compute_dtype: torch.dtype
    ) -> None:
        self.settings = settings
        self.model = model
        self.regularization = regularization
        self.compute_dtype = compute_dtype

    @property
    def shortest_frames(self) -> int:
        """Frames of the shortest utterance that can be learned from."""
        return int(self.settings.shortest_frames)

    def check(self, config: Config) -> None:
        """Check that the settings of a training run are compatible. Raises a UserError that names the setting."""
        self.settings.check_new()
        if (metric := config.trainer.best_metric) not in self.error_metrics:
            raise UserError(
                f"trainer.best_metric={metric}: objective.name={self.settings.name} has no such error metric; choose "
                f"{' or '.join(self.error_metrics)}"
            )

    def unfrozen(self) -> ObjectiveSettings:
        """Return the settings with no parameters frozen."""
        settings: ObjectiveSettings = self.settings
        return settings

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Build the model: encoder and heads."""

    @property
    def changes_model(self) -> bool:
        """Whether `after_step` changes the model, which not every engine allows."""
        return type(self).after_step is not Objective.after_step

    def read_target(self, cut: Cut, *, offset: int, samples: int) -> Target:
        """Read the target of `samples` samples of an utterance, from sample `offset` on. Runs in a loader process.

        Raises AudioError if the utterance cannot be used.
        """
        return Target()

    def describe_targets(self, cuts: Iterable[Cut]) -> list[str]:
        """Say in a few lines what the targets of these utterances are, before the first update.

        Raises a UserError that says what to do if a model cannot learn from them. By default, reads and says nothing.
        """
        return []

    def largest_target(self, samples: int) -> Any:
        """Return the largest target that `samples` samples of noise may have, to measure memory without a corpus."""
        return None

    @abstractmethod
    def make_inputs(self, utterances: Sequence[Utterance], *, rng: Generators, width: int = 0) -> Inputs:
        """Pad a micro-batch to at least `width` samples, and make all of its random draws. Runs in a loader process.

        If `utterances` is empty, return a micro-batch of silence with weight 0 that `forward` accepts.
        """

    def forward(self, module: nn.Module, inputs: Any, *, step: StepContext, training: bool) -> Sums:
        """Compute sums over the micro-batches in `inputs`, on this rank.

        `module` is the model or what an engine wraps around it. Without `training` nothing is random.
        """
        if not training:
            sums: Sums = module(inputs)
            return sums
        step.seed_dropout()
        active = step.active_layers(self.model.layers, self.regularization.layerdrop)
        sums = module(inputs, active=active, **self.draws(inputs, step))
        return sums

    def draws(self, inputs: Any, step: StepContext) -> dict[str, Any]:
        """Further arguments of the model in training, random or depending on the update."""
        return {}

    def inspect(self, module: nn.Module, inputs: Any, *, samples: int, blocks: Sequence[int]) -> Details | None:
        """Return what can be shown of the first `samples` utterances: attention of these `blocks`, masks, codes, text.

        Runs one forward of `module` in evaluation mode, so it is collective if an engine shards it, and changes
        nothing. By default, runs nothing and returns None.
        """
        return None

    def after_step(self, module: nn.Module, update: int) -> None:  # noqa: B027 - most objectives change nothing
        """Change the model after the optimizer step of update `update`, e.g. an EMA teacher."""

    @abstractmethod
    def metrics(self, sums: Any) -> dict[str, float]:
        """Compute metrics from sums over all ranks. `loss` is in nats per unit of weight (masked frame, or label)."""

    def scheduled(self, update: int) -> dict[str, float]:
        """Return values to log that depend only on the update number, besides the learning rate."""
        return {}

    @abstractmethod
    def line(self, metrics: Mapping[str, float]) -> str:
        """Format the metrics for a log line: fields with their units, two spaces between them, and chance levels."""

    @abstractmethod
    def table(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Format the metrics of an evaluation, by name, with units."""

    def findings(self, metrics: Mapping[str, float], limits: HealthConfig) -> list[Finding]:
        """Return what a log line shows of collapse, chance level and a solved task: at most one finding of each kind.

        Chance level is normal early in a run; training/health.py knows until when. It also watches the loss and the
        gradient norm, for every objective. Metrics may be NaN.
        """
        return []

    def phase(self, update: int) -> int:
        """Return the phase of training that `update` belongs to: losses and norms are compared within a phase only."""
        return 0

    @abstractmethod
    def panels(self) -> tuple[Panel, Panel, Panel]:
        """Return the plots of a report: the loss, the most informative metric, and one more."""

    def codes(self, module: nn.Module, encoded: EncoderOutput) -> Tensor | None:
        """Return the discrete codes of each frame, [B, T, G] for G codebooks, or None if the model has none."""
        return None

    def check_outputs_text(self) -> None:
        """Raise a UserError if the model has no output layer for text."""
        if not self.vocabulary:
            raise UserError(
                f"objective.name={self.settings.name}: the model does not output text; "
                "fine-tune it first: w2vscale finetune"
            )

    def logits(self, module: Any, hidden_TD: Tensor) -> Tensor:
        """Compute logits [T, V] from the output [T, D] of the last block. Raises UserError without output layer."""
        self.check_outputs_text()
        raise NotImplementedError(f"{type(self).__name__} has a vocabulary, so it needs its own `logits`")

    def transformers_head(self) -> TransformersHead:
        """Return the Transformers names for the heads. By default, only the encoder is exported."""
        return TransformersHead()


def empty_model(objective: Objective) -> Any:
    """Build the model without allocating memory for its parameters."""
    with empty_parameters():
        return objective.build_model()


def initial_state(objective: Objective, seed: int, *, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield the initial values of parameters and buffers; the same for any engine and number of processes."""
    seed_of = partial(derived_seed, seed, Stream.INITIALISATION)
    return initial_values(empty_model(objective), seed_of, without=without)
