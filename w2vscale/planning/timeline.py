"""Memory and time of a forward and backward as functions of the amount of audio, for models of any depth.

Every utterance adds the same, and so does every block (with `engine.activation_checkpointing=selective`, every n-th and
those up to the next). So two lengths of the batch and two depths of a shallow model give all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from w2vscale.config import Config
from w2vscale.planning.fake_pass import DeviceType, Moment, Pass, fake_pass
from w2vscale.planning.operations import Speeds
from w2vscale.planning.units import BEFORE_BLOCKS

UTTERANCES = (2, 3)
"""In the batches that are measured: with one alone, nothing would be padded."""


@dataclass(frozen=True)
class Affine:
    """A constant, and what each utterance adds to it."""

    fixed: float
    per_utterance: float

    def __call__(self, utterances: float) -> float:
        """Return the value for a number of utterances."""
        return self.fixed + self.per_utterance * utterances


@dataclass(frozen=True)
class Timeline:
    """The moments of a forward and backward, in order (see `Moment`), and the seconds that they take at least."""

    unit: NDArray[np.int64]
    backward: NDArray[np.bool_]
    gradient: NDArray[np.int64]  # elements that are complete at the end of each moment
    fixed: NDArray[np.float64]  # bytes of activations …
    per_utterance: NDArray[np.float64]  # … and what each utterance adds
    seconds: float  # audio of an utterance
    forward_seconds: Affine
    backward_seconds: Affine

    def live(self, utterances: float) -> NDArray[np.float64]:
        """Return the most bytes of activations and temporary tensors in each moment."""
        live: NDArray[np.float64] = self.fixed + self.per_utterance * utterances
        return live


def timeline(config: Config, *, seconds: float, device: DeviceType, speeds: Speeds) -> Timeline:
    """Measure the passes of a model with utterances of `seconds`."""
    shallow, deep = depths(config)
    few, many = (
        [
            fake_pass(with_layers(config, layers), utterances=utterances, seconds=seconds, device=device, speeds=speeds)
            for layers in dict.fromkeys((shallow, deep))
        ]
        for utterances in UTTERANCES
    )
    layers = config.model.layers
    one, other = (
        passes[0] if shallow == deep else extended(*passes, shallow=shallow, deep=deep, layers=layers)
        for passes in (few, many)
    )
    first, second = UTTERANCES

    def affine(at_first: float, at_second: float) -> Affine:
        slope = (at_second - at_first) / (second - first)
        return Affine(at_first - slope * first, slope)

    lines = [affine(a.live, b.live) for a, b in zip(one.moments, other.moments, strict=True)]
    return Timeline(
        unit=np.array([moment.unit for moment in one.moments]),
        backward=np.array([moment.backward for moment in one.moments]),
        gradient=np.array([moment.gradient for moment in one.moments]),
        fixed=np.array([line.fixed for line in lines]),
        per_utterance=np.array([line.per_utterance for line in lines]),
        seconds=seconds,
        forward_seconds=affine(one.forward, other.forward),
        backward_seconds=affine(one.backward, other.backward),
    )


def depths(config: Config) -> tuple[int, int]:
    """Return the numbers of layers of the two models that are measured."""
    engine, layers = config.engine, config.model.layers
    period = engine.activation_checkpointing_every if engine.activation_checkpointing == "selective" else 1
    shallow = period + layers % period
    return (shallow, shallow + period) if layers > shallow + period else (layers, layers)


def with_layers(config: Config, layers: int) -> Config:
    """Return the settings with another depth."""
    return config.model_copy(update={"model": config.model.model_copy(update={"layers": layers})})


def extended(one: Pass, other: Pass, *, shallow: int, deep: int, layers: int) -> Pass:
    """Extend the passes of models of `shallow` and `deep` layers to one of `layers`.

    The blocks that the deeper model has in addition are repeated, each time with as much more memory as they keep.
    """
    period = deep - shallow
    repeats = (layers - deep) // period
    rest, added = BEFORE_BLOCKS + deep, range(BEFORE_BLOCKS + shallow, BEFORE_BLOCKS + deep)

    def moved(moments: Sequence[Moment], fewer: Sequence[Moment], times: int) -> Iterator[Moment]:
        """`moments` in a model with the added blocks `times` more often; `fewer`: the same in the shallower model."""
        for moment, same in zip(moments, fewer, strict=True):
            unit = moment.unit + (repeats * period if moment.unit == rest else times * period)
            yield moment._replace(unit=unit, live=moment.live + times * (moment.live - same.live))

    (before, blocks, head), (_, fewer_blocks, fewer_head) = (
        _parts([moment for moment in each.moments if not moment.backward], blocks, including_rest=True)
        for each, blocks in ((other, added), (one, range(added.start - period, added.start)))
    )
    (heads, blocks_back, tail), (fewer_heads, fewer_blocks_back, _) = (
        _parts([moment for moment in each.moments if moment.backward], blocks, including_rest=False)
        for each, blocks in ((other, added), (one, range(added.start - period, added.start)))
    )
    moments = [*moved(before, before, 0)]
    for times in range(repeats + 1):
        moments += moved(blocks, fewer_blocks, times)
    moments += moved(head, fewer_head, repeats)
    moments += moved(heads, fewer_heads, repeats)
    for times in reversed(range(repeats + 1)):
        moments += moved(blocks_back, fewer_blocks_back, times)
    moments += moved(tail, tail, 0)
    return Pass(
        moments,
        other.forward + repeats * (other.forward - one.forward),
        other.backward + repeats * (other.backward - one.backward),
    )


def _parts(moments: Sequence[Moment], blocks: range, *, including_rest: bool) -> tuple[Sequence[Moment], ...]:
    """Split moments into those before, in and after `blocks`. In a forward, each block begins with one of the rest."""
    places = [place for place, moment in enumerate(moments) if moment.unit in blocks]
    first, last = places[0] - including_rest, places[-1] + 1
    return moments[:first], moments[first:last], moments[last:]
