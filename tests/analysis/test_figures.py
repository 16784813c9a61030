"""Figures are drawn without pyplot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from w2vscale.analysis.figures import new_figure, save_figure
from w2vscale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_the_suffix_names_the_format(tmp_path: Path) -> None:
    figure = new_figure(width=2, height=1)
    figure.subplots().plot([1, 2])
    for name, start in (("a.png", b"\x89PNG"), ("folder/a.pdf", b"%PDF")):
        save_figure(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    for name in ("a", "a.jsonl"):
        with pytest.raises(UserError, match="not the name of an image file"):
            save_figure(figure, tmp_path / name)


def test_drawing_does_not_load_pyplot(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from w2vscale.analysis.figures import draw_layers
before = "matplotlib" in sys.modules
draw_layers({{"run": {{0: 0.5, 1: 0.25}}}}, Path({str(tmp_path / "layers.png")!r}))
print(before, "matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.stdout == "False True False\n", done.stderr
