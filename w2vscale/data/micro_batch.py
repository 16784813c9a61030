"""The unit of loss: a micro-batch of audio with everything that was drawn for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from w2vscale.data.inputs import Inputs, pack, pin, unpack


@dataclass(frozen=True)
class BadAudio:
    """An utterance that was left out, or a noise that was not added, and why: `kind` in a word, `reason` in full."""

    utterance: str
    file: str
    kind: str
    reason: str
    left_out: bool = True


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch `number` of the endless plan."""

    number: int
    inputs: Inputs
    audio_samples: int
    bad: tuple[BadAudio, ...] = ()

    @property
    def weight(self) -> int:
        """Its share of the loss denominator of an update."""
        return sum(self.inputs.weights)

    @property
    def padded_samples(self) -> int:
        """Samples that are computed, padding included."""
        return self.inputs.audio.waveforms_BS.numel()

    @property
    def utterances(self) -> int:
        """Utterances with audio."""
        return int(self.audio_samples > 0) * sum(self.inputs.audio.utterances)

    @property
    def frames(self) -> int:
        """Frames without padding."""
        return int(self.inputs.audio.frames_B.sum())

    @property
    def masked_frames(self) -> int:
        """Frames that are masked in the input."""
        return int(self.inputs.audio.mask_BT.sum())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inputs": pack(self.inputs)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, inputs=unpack(*state["inputs"]))

    def pin_memory(self) -> MicroBatch:
        """A copy in pinned memory (called by the DataLoader)."""
        return replace(self, inputs=pin(self.inputs))
