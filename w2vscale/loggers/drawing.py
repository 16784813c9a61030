"""Draws what an objective shows of a few utterances: spectrograms with masks and symbols, codes, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from w2vscale.analysis.figures import add_grid, new_figure, plain
from w2vscale.config import ModelConfig
from w2vscale.loggers.base import Audio
from w2vscale.models.lengths import hop
from w2vscale.objectives.details import Details, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 90
COLOURS = 24  # of a picture: PNGs with a small palette stay below 100 kB
RIGHT, WRONG, MASKED, INK = "#2b7bba", "#d9822b", "#6b7280", "#374151"
DYNAMIC_RANGE = 80.0  # dB below the loudest point of a spectrogram
MOST_CODES = 64  # rows and columns of a map of codes
MOST_HEADS = 12
MOST_POINTS = 64  # rows and columns of a map of attention; longer ones are averaged
SYMBOL_ROWS = 4  # into which symbols are spread, so that they do not overlap
SYMBOL_WIDTH = 0.085  # of a character in inches


@dataclass(frozen=True)
class Picture:
    """Pictures (PNG), audio and texts, by name."""

    images: Mapping[str, bytes] = field(default_factory=dict)
    audio: Mapping[str, Audio] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def draw(details: Details, model: ModelConfig) -> Picture:
    """Draw all that there is to see."""
    images: dict[str, bytes] = {}
    audio: dict[str, Audio] = {}
    texts: dict[str, str] = {}
    for number, sample in enumerate(details.samples, start=1):
        images[f"{number}_spectrogram"] = png(draw_sample(sample, model, title=f"validation utterance {number}"))
        audio[f"{number}_audio"] = Audio(playable(sample.waveform_S), model.sampling_rate)
        if sample.reference or sample.hypothesis:
            texts[f"{number}_text"] = f"reference:  {sample.reference}\nhypothesis: {sample.hypothesis}"
    if details.codes_MG is not None and len(details.codes_MG):
        images["codes_usage"] = png(draw_usage(details.codes_MG, details.entries))
        if details.codes_MG.shape[1] > 1:
            images["codes_cooccurrence"] = png(draw_cooccurrence(details.codes_MG, details.entries))
    for block, weights_HTT in details.attention.items():
        seconds = weights_HTT.shape[1] * hop(model) / model.sampling_rate
        images[f"attention_block_{block:02d}"] = png(draw_attention(weights_HTT, block=block, seconds=seconds))
    return Picture(images, audio, texts)


def draw_sample(sample: Sample, model: ModelConfig, *, title: str) -> Figure:
    """Draw the spectrogram of an utterance above its masked frames and whether they were predicted, or its symbols."""
    seconds = len(sample.waveform_S) / model.sampling_rate
    frame = hop(model) / model.sampling_rate
    masked = bool(sample.masked_T.any())
    width = float(np.clip(1.1 * seconds, 5.6, 12.0))
    figure = _figure(width=width, height=3.3 if masked else 3.7)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(6, 1) if masked else (3, 1))
    decibels_FN = spectrogram(sample.waveform_S, model.sampling_rate)
    upper.imshow(
        decibels_FN, aspect="auto", origin="lower", cmap="Greys", interpolation="nearest",
        extent=(0.0, seconds, 0.0, model.sampling_rate / 2000),
        vmin=decibels_FN.max() - DYNAMIC_RANGE, vmax=decibels_FN.max(),
    )  # fmt: skip
    upper.set_ylabel("frequency (kHz)")
    if masked:
        for start, end in spans(sample.masked_T):
            upper.axvspan(start * frame, end * frame, color=RIGHT, alpha=0.18, linewidth=0)
        _draw_accuracy(lower, sample, frame)
        title += f": {int(sample.masked_T.sum())} masked frames, {float(np.nanmean(sample.correct_T)):.0%} correct"
    else:
        places = [(first + 0.5) * frame for first, _ in sample.symbols]
        texts = [symbol for _, symbol in sample.symbols]
        for at, symbol, row in zip(places, texts, symbol_rows(places, texts, seconds / (0.9 * width)), strict=True):
            height = 1.0 - (row + 0.5) / SYMBOL_ROWS
            lower.text(at, height, plain(symbol), ha="center", va="center", fontsize=9, color="black", clip_on=False)
            lower.plot([at, at], [1.0, min(height + 0.13, 1.0)], color=RIGHT, linewidth=0.6, alpha=0.5)
            upper.axvline(at, color=RIGHT, alpha=0.25, linewidth=0.6)
        lower.set_ylabel("symbols", rotation=0, ha="right", va="center")
        title += f": {len(sample.symbols)} symbols" if sample.symbols else ""
    lower.set(xlabel="time (s)", ylim=(0, 1), yticks=[], xlim=(0, seconds))
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    upper.set_title(title, fontsize="medium", loc="left", color=INK)
    return figure


def symbol_rows(places: Sequence[float], symbols: Sequence[str], seconds_per_inch: float) -> list[int]:
    """The row of each symbol, so that it does not overlap its neighbours: the first that is free there, or the one
    that has been free for the longest."""
    ends = [-np.inf] * SYMBOL_ROWS
    rows = []
    for at, symbol in zip(places, symbols, strict=True):
        half = 0.5 * SYMBOL_WIDTH * (len(symbol) + 0.5) * seconds_per_inch
        row = next((row for row, end in enumerate(ends) if end <= at - half), int(np.argmin(ends)))
        ends[row] = at + half
        rows.append(row)
    return rows


def _draw_accuracy(axes: Axes, sample: Sample, frame: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    colours = LinearSegmentedColormap.from_list("predictions", [WRONG, RIGHT])
    frames = len(sample.correct_T)
    axes.imshow(
        sample.correct_T[np.newaxis], aspect="auto", cmap=colours, vmin=0.0, vmax=1.0, interpolation="nearest",
        extent=(0.0, frames * frame, 0.0, 1.0),
    )  # fmt: skip
    axes.set_ylabel("masked", rotation=0, ha="right", va="center")
    axes.legend(
        handles=[Patch(color=WRONG, label="wrong"), Patch(color=RIGHT, label="correct")], ncols=2, frameon=False,
        loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, fontsize="small",
    )  # fmt: skip


def draw_usage(codes_MG: NDArray[np.int64], entries: int) -> Figure:
    """Draw how often each entry of each codebook is used, the most frequent first."""
    figure = _figure(width=6.5, height=3.5)
    axes = figure.subplots()
    for book, codes_M in enumerate(codes_MG.T):
        counts_V = np.sort(np.bincount(codes_M, minlength=entries))[::-1]
        label = f"codebook {book}: {int((counts_V > 0).sum())} of {entries} used"
        axes.plot(np.arange(1, entries + 1), 100 * counts_V / len(codes_M), linewidth=1.3, label=label)
    axes.axhline(100 / entries, color=MASKED, linewidth=0.8, linestyle=":", label="equal use")
    axes.set_xscale("log")
    ticks = round_numbers(entries, factors=(1, 2, 5) if entries < 1000 else (1,))[1:]
    axes.set_xticks(ticks, [f"{one:,}" for one in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="rank of the entry, most frequent first", ylabel=f"% of {len(codes_M)} masked frames")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", frameon=False)
    add_grid(axes)
    return figure


def draw_cooccurrence(codes_MG: NDArray[np.int64], entries: int) -> Figure:
    """Draw how often entries of the first two codebooks are used together: the most frequent of each."""
    one, other = (np.argsort(-np.bincount(codes_M, minlength=entries), kind="stable") for codes_M in codes_MG.T[:2])
    joint_VV = np.zeros((entries, entries))
    np.add.at(joint_VV, (codes_MG[:, 0], codes_MG[:, 1]), 1)
    shown = min(entries, MOST_CODES)
    joint_VV = joint_VV[np.ix_(one[:shown], other[:shown])]
    figure = _figure(width=5.2, height=4.4)
    figure.set_layout_engine("compressed")  # constrained, for axes of a fixed aspect
    axes = figure.subplots()
    image = axes.imshow(np.log10(1 + joint_VV), cmap="Blues", interpolation="nearest", origin="lower")
    axes.set(
        xlabel=f"codebook 1: {shown} most frequent of {entries}", ylabel=f"codebook 0: {shown} most frequent",
        xticks=[], yticks=[],
    )  # fmt: skip
    counts = round_numbers(int(joint_VV.max()))
    bar = figure.colorbar(image, ax=axes, label="masked frames")
    bar.set_ticks(np.log10(1 + np.array(counts)).tolist(), labels=[f"{one:,}" for one in counts])
    return figure


def round_numbers(largest: int, factors: Sequence[int] = (1, 2, 5)) -> list[int]:
    """Ticks of a logarithmic axis up to `largest`: 0, 1, 2, 5, 10, 20, 50 …"""
    powers = range(len(str(largest)))
    return [0, *(number for power in powers for factor in factors if (number := factor * 10**power) <= largest)]


def draw_attention(weights_HTT: NDArray[np.float32], *, block: int, seconds: float) -> Figure:
    """Draw the attention weights of each head on one scale: queries downwards, keys to the right."""
    from matplotlib.colors import PowerNorm

    heads = min(len(weights_HTT), MOST_HEADS)
    columns = min(heads, 4)
    rows = -(-heads // columns)
    figure = _figure(width=2.0 * columns + 0.9, height=2.0 * rows + 0.7)
    figure.set_layout_engine("compressed")  # constrained, for axes of a fixed aspect
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    maps = [pooled(weights_TT, MOST_POINTS) for weights_TT in weights_HTT[:heads]]
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(float(weights_TT.max()) for weights_TT in maps))
    extent = (0.0, seconds, seconds, 0.0)
    for head, axes in enumerate(grid.flat):
        if head >= heads:
            axes.set_axis_off()
            continue
        image = axes.imshow(maps[head], cmap="Blues", interpolation="nearest", extent=extent, norm=norm)
        axes.set_title(f"head {head + 1}", fontsize="small", color=INK)
        axes.label_outer()
    for axes in grid[-1]:
        axes.set_xlabel("key (s)", fontsize="small")
    for axes in grid[:, 0]:
        axes.set_ylabel("query (s)", fontsize="small")
    bar = figure.colorbar(image, ax=grid, aspect=15 * rows)
    bar.set_label("attention weight", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    bar.ax.locator_params(nbins=4)
    figure.suptitle(f"attention of block {block}, validation utterance 1", fontsize="medium", color=INK)
    return figure


def spectrogram(waveform_S: NDArray[np.float32], sampling_rate: int) -> NDArray[np.float64]:
    """Return power in dB, [F, N]: Hann windows of 25 ms every 10 ms. A short waveform is padded with silence."""
    size, step = round(0.025 * sampling_rate), round(0.010 * sampling_rate)
    padded_S = np.pad(waveform_S.astype(np.float64), (0, max(size - len(waveform_S), 0)))
    windows_NS = np.lib.stride_tricks.sliding_window_view(padded_S, size)[::step] * np.hanning(size)
    power_NF = np.abs(np.fft.rfft(windows_NS)) ** 2
    return 10.0 * np.log10(np.maximum(power_NF, 1e-10)).T


def spans(mask_T: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (first, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask_T, [False]]).astype(np.int8)))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def pooled(weights_TT: NDArray[np.floating], most: int) -> NDArray[np.floating]:
    """Average over blocks, so that at most `most` rows and columns are left."""
    size = -(-len(weights_TT) // most)
    starts = np.arange(0, len(weights_TT), size)
    sums = np.add.reduceat(np.add.reduceat(weights_TT, starts, axis=0), starts, axis=1)
    sizes = np.diff(np.append(starts, len(weights_TT)))
    means: NDArray[np.floating] = sums / np.outer(sizes, sizes)
    return means


def playable(waveform_S: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale a waveform down to the range of audio files if it exceeds it, e.g. after normalisation."""
    peak = float(np.abs(waveform_S).max(initial=0.0))
    return waveform_S / peak if peak > 1.0 else waveform_S


def _figure(*, width: float, height: float) -> Figure:
    figure = new_figure(width=width, height=height)
    figure.set_layout_engine("constrained")  # before anything is drawn, because colour bars depend on it
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG with a palette."""
    from PIL import Image

    drawn, reduced = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    drawn.seek(0)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE, kmeans=1).save(
            reduced, format="png", optimize=True
        )
    return reduced.getvalue()
