"""The micro-batch: the unit of loss, with its audio and everything drawn at random for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lhotse.cut import Cut

from w2vscale.data.audio import AudioError
from w2vscale.data.cuts import NotACut
from w2vscale.data.inputs import Inputs, pack, pin, unpack
from w2vscale.data.manifest import audio_path


@dataclass(frozen=True)
class BadAudio:
    """An utterance that was left out (or otherwise noted), and why: `kind` in a word or two, `reason` in full."""

    utterance: str
    file: str
    kind: str
    reason: str
    left_out: bool = True

    @classmethod
    def of(cls, cut: Cut, error: AudioError, *, left_out: bool = True) -> BadAudio:
        """The record of an utterance whose audio cannot be used."""
        return cls(cut.id, audio_path(cut), error.kind, str(error), left_out)

    @classmethod
    def of_line(cls, number: int, error: NotACut, *, left_out: bool = True) -> BadAudio:
        """The record of utterance `number` of a manifest, from 0, whose line is not a cut."""
        return cls(f"utterance {number + 1}", "", "not a cut", str(error), left_out)

    def __str__(self) -> str:
        return f"{self.utterance} ({self.file}): {self.reason}" if self.file else self.reason


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch `number` of the endless plan."""

    number: int
    inputs: Inputs
    audio_samples: int
    bad: tuple[BadAudio, ...] = ()

    @property
    def weight(self) -> int:
        """Contribution to the loss denominator: masked frames, or labels."""
        return sum(self.inputs.weights)

    @property
    def padded_samples(self) -> int:
        """Number of samples, including padding."""
        return self.inputs.audio.waveforms_BS.numel()

    @property
    def utterances(self) -> int:
        """Number of utterances; 0 if no audio could be read."""
        return int(self.audio_samples > 0) * sum(self.inputs.audio.utterances)

    @property
    def frames(self) -> int:
        """Number of frames, without padding."""
        return int(self.inputs.audio.frames_B.sum())

    @property
    def masked_frames(self) -> int:
        """Number of masked frames."""
        return int(self.inputs.audio.mask_BT.sum())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inputs": pack(self.inputs)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, inputs=unpack(*state["inputs"]))

    def pin_memory(self) -> MicroBatch:
        """Return a copy in pinned memory. Called by the DataLoader."""
        return replace(self, inputs=pin(self.inputs))
