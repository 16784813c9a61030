"""The pictures of samples: no label is cut off or hidden by another, whatever their content."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from tests.helpers.audio import noise
from w2vscale.config import ModelConfig
from w2vscale.loggers import drawing
from w2vscale.loggers.drawing import draw_attention, draw_cooccurrence, draw_sample, draw_usage, png, symbol_rows
from w2vscale.objectives.details import Sample

MODEL = ModelConfig()
RNG = np.random.default_rng(0)


def sample(seconds: float, *, masked: bool) -> Sample:
    """An utterance with masked frames, some of which are predicted, or with a symbol at every fourth frame."""
    frames = int(50 * seconds)
    mask_T = np.zeros(frames, dtype=np.bool_)
    mask_T[frames // 4 : frames // 2] = masked
    correct_T = np.where(mask_T, np.arange(frames) % 5 == 0, np.nan).astype(np.float32)
    symbols = () if masked else tuple((frame, "MW|"[frame % 3]) for frame in range(0, frames, 4))
    return Sample(noise(seconds), mask_T, correct_T, symbols)


def texts(figure: Any) -> list[tuple[Text, Any]]:
    """The visible texts of a figure with their places in pixels, as they are in the file."""
    figure.set_dpi(drawing.DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn: list[Text] = list(figure.texts)
    for axes in (axes for axes in figure.axes if axes.axison):
        drawn += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        drawn += axes.legend_.get_texts() if axes.legend_ else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            drawn += [label for tick in ticks for label in (tick.label1, tick.label2)]
    found = [one for one in drawn if one.get_visible() and one.get_text().strip()]
    return [(one, one.get_window_extent(canvas.get_renderer())) for one in found]


def weights(heads: int, frames: int) -> Any:
    """Attention weights that sum to 1 over the keys."""
    weights_HTT = RNG.random((heads, frames, frames)).astype(np.float32)
    return weights_HTT / weights_HTT.sum(axis=-1, keepdims=True)


CODES = np.minimum(RNG.geometric(0.05, (800, 2)) - 1, 63)
FIGURES = {
    "masked": lambda: draw_sample(sample(4.0, masked=True), MODEL, title="validation utterance 12"),
    "short": lambda: draw_sample(sample(0.6, masked=True), MODEL, title="validation utterance 1"),
    "symbols": lambda: draw_sample(sample(11.0, masked=False), MODEL, title="validation utterance 1"),
    "usage": lambda: draw_usage(CODES, 320),
    "cooccurrence": lambda: draw_cooccurrence(CODES, 64),
    "three heads": lambda: draw_attention(weights(3, 60), block=4, seconds=1.2),
    "twelve heads": lambda: draw_attention(weights(12, 200), block=11, seconds=4.0),
    "five heads": lambda: draw_attention(weights(5, 500), block=1, seconds=10.0),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off(name: str) -> None:
    figure = FIGURES[name]()
    found = texts(figure)
    width, height = figure.bbox.size
    cut = [
        (text.get_text(), box.extents.round().tolist())
        for text, box in found
        if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > width + 0.5 or box.y1 > height + 0.5
    ]
    assert len(found) > 5 and cut == []


def test_symbols_do_not_overlap() -> None:
    boxes = [box for text, box in texts(FIGURES["symbols"]()) if text.get_text() in ("M", "W", "|")]
    assert len(boxes) == 138
    overlaps = [
        (one, other)
        for place, one in enumerate(boxes)
        for other in boxes[place + 1 :]
        if min(one.x1, other.x1) > max(one.x0, other.x0) and min(one.y1, other.y1) > max(one.y0, other.y0)
    ]
    assert overlaps == []


def test_symbols_with_room_are_in_one_row() -> None:
    assert symbol_rows([0.0, 1.0, 2.0], ["a", "b", "c"], 1.0) == [0, 0, 0]
    assert symbol_rows([0.0, 0.01, 0.02, 1.0], ["a", "b", "c", "d"], 1.0) == [0, 1, 2, 0]
    assert symbol_rows([0.0, 0.01, 0.02, 0.03, 0.04, 0.05], ["a"] * 6, 1.0) == [0, 1, 2, 3, 0, 1], "the longest free"


@pytest.mark.parametrize(
    ("entries", "ticks"), [(64, "1 2 5 10 20 50"), (320, "1 2 5 10 20 50 100 200"), (8192, "1 10 100 1,000")]
)
def test_ranks_of_codes_are_plain_numbers(entries: int, ticks: str) -> None:
    axes = draw_usage(CODES, entries).axes[0]
    assert " ".join(label.get_text() for label in axes.get_xticklabels()) == ticks


def test_heads_share_a_scale_of_colours() -> None:
    figure = draw_attention(weights(3, 60), block=4, seconds=1.2)
    assert len({image.norm for axes in figure.axes for image in axes.images}) == 1
    assert "attention weight" in [text.get_text() for text, _ in texts(figure)]


def test_a_picture_keeps_the_colours_of_its_legend() -> None:
    picture = Image.open(BytesIO(png(FIGURES["masked"]())))
    colours = np.array(picture.getpalette()).reshape(-1, 3) / 255
    for wanted in (drawing.RIGHT, drawing.WRONG):
        assert np.abs(colours - to_rgb(wanted)).max(axis=1).min() < 0.05
