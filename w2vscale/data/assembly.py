"""From planned crops to a micro-batch: reads the audio, and has the objective make the inputs of its forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lhotse.cut import Cut

from w2vscale.config import ModelConfig
from w2vscale.data.audio import AudioError, read_audio, standardize
from w2vscale.data.augmentation import Augmentation
from w2vscale.data.inputs import Inputs, Utterance
from w2vscale.data.manifest import audio_path
from w2vscale.data.micro_batch import BadAudio, MicroBatch
from w2vscale.data.randomness import Generators, Stream, generator


class InputMaker(Protocol):
    """What data needs of an objective; see `w2vscale.objectives.base.Objective`."""

    @property
    def crops(self) -> bool:
        """Whether an utterance may be cropped."""

    @property
    def shortest_frames(self) -> int:
        """Frames of the shortest utterance that can be learned from."""

    def read_target(self, cut: Cut, *, offset: int, samples: int) -> Any:
        """Read the target of a part of an utterance. Raises AudioError if the utterance cannot be used."""

    def largest_target(self, samples: int) -> Any:
        """Return the largest target that `samples` samples of noise may have."""

    def make_inputs(self, utterances: Sequence[Utterance], *, rng: Generators, width: int = 0) -> Inputs:
        """Pad a micro-batch, and make all of its random draws."""


class Crop(NamedTuple):
    """A part of an utterance: `length` samples from sample `offset`."""

    cut: Cut
    offset: int
    length: int


@dataclass(frozen=True)
class Assembler:
    """Makes micro-batches of crops. A pure function of its arguments and the audio."""

    maker: InputMaker
    model: ModelConfig
    seed: int
    augmentation: Augmentation | None = None

    def __call__(self, number: int, crops: Sequence[Crop | BadAudio], *, width: int = 0) -> MicroBatch:
        """Make micro-batch `number`, at least `width` samples wide. Leaves out unusable utterances."""
        utterances: list[Utterance] = []
        bad: list[BadAudio] = []
        for place, crop in enumerate(crops):
            if isinstance(crop, BadAudio):
                bad.append(crop)
                continue
            try:
                utterances.append(self._utterance(crop, number, place, bad))
            except AudioError as error:
                bad.append(BadAudio.of(crop.cut, error))
        inputs = self.maker.make_inputs(
            utterances, rng=lambda place: generator(self.seed, Stream.MASK, number, place), width=width
        )
        samples = sum(utterance.waveform.size for utterance in utterances)
        return MicroBatch(number, inputs, samples, tuple(bad))

    def _utterance(self, crop: Crop, number: int, place: int, bad: list[BadAudio]) -> Utterance:
        target = self.maker.read_target(crop.cut, offset=crop.offset, samples=crop.length)
        audio = read_audio(
            crop.cut,
            sampling_rate=self.model.sampling_rate,
            offset=crop.offset,
            length=crop.length,
            normalize=self.model.normalize_waveform,
            eps=self.model.waveform_eps,
        )
        if target.note is not None:
            kind, reason = target.note
            bad.append(BadAudio(crop.cut.id, audio_path(crop.cut), kind, reason, left_out=False))
        if self.augmentation is not None:
            changed, unusable = self.augmentation(audio, number=number, place=place)
            bad += unusable
            if self.model.normalize_waveform and changed is not audio:
                changed = standardize(changed, self.model.waveform_eps)
            audio = changed
        return Utterance(audio, target.value, place)
