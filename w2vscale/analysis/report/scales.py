"""Axes of plots: from values to places, round numbers for the ticks, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from w2vscale.analysis.report.curves import Floats

MISSING = "–"


@dataclass(frozen=True)
class Scale:
    """Maps the values `low` to `high` to the places `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, values: Floats) -> Floats:
        """The places of values; NaN for a value that a logarithmic scale does not have."""
        low, high = self.low, self.high
        if self.logarithmic:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.where(values > 0.0, np.log10(values), np.nan)
            low, high = math.log10(low), math.log10(high)
        return np.asarray(self.start + (values - low) / (high - low) * (self.end - self.start), dtype=np.float64)

    def ticks(self, count: int) -> list[float]:
        """About `count` round numbers on the scale."""
        return _powers(self.low, self.high) if self.logarithmic else _multiples(self.low, self.high, count)


def scale_of(values: Floats, start: float, end: float, *, logarithmic: bool = False) -> Scale:
    """A scale on which all values have room. Values that come near zero have a scale from zero.

    A value is NaN, 0, or between 1e-30 and 1e30 or the negative of such a number: see `drawable`.
    """
    finite = values[np.isfinite(values) & ((values > 0.0) | (not logarithmic))]
    if not finite.size:
        return Scale(0.1, 1.0, start, end, logarithmic) if logarithmic else Scale(0.0, 1.0, start, end)
    low, high = float(finite.min()), float(finite.max())
    if logarithmic:
        margin = max((high / low) ** 0.06, 1.05)
        return Scale(low / margin, high * margin, start, end, logarithmic=True)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    zero_based = 0.0 <= low <= 0.4 * high
    return Scale(0.0 if zero_based else low - margin, high + margin, start, end)


def _multiples(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [min(max(number * step, low), high) for number in range(first, last + 1)]  # rounding may leave the scale


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten; also their multiples if there are few; on a short scale, any round numbers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(last - first) // 8)
    powers = range(first, last + 1, max(every, 1))
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        found = [one for power in powers for factor in factors if low <= (one := factor * 10.0**power) <= high]
        if len(found) >= 3:
            return found
    return found if len(found) > 1 else _multiples(low, high, 4)


def spread(places: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """Move sorted places apart to at least `gap`, as little as possible and within the bounds if there is room."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap if found else lowest))
    for number in range(len(found) - 1, -1, -1):
        found[number] = min(found[number], highest - gap * (len(found) - 1 - number))
    return found


def significant(value: float) -> str:
    """Three significant digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def metric(value: float | None, *, percent: bool = False) -> str:
    """A metric for a table: in percent, with three decimals, or without any from ten on; – if there is none."""
    if value is None:
        return MISSING
    return f"{value:.1%}" if percent else f"{value:.3f}" if value < 10 else f"{value:.0f}"


def tick(value: float, *, percent: bool = False) -> str:
    """A number at an axis."""
    return f"{short(round(100 * value, 9))}%" if percent else short(value)


def short(value: float) -> str:
    """A number for an axis or a table, in few characters: 0.05, 250, 1,500, 400k, 1.2M, 2e-5."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= abs(value) < 1e12:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    if value and not 1e-3 <= abs(value) < 1e12:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"
