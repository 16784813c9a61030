"""Small audio files and manifests that the tests make for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from lhotse import Recording
from lhotse.cut import Cut
from numpy.typing import NDArray

from w2vscale.corpora.index import build_index
from w2vscale.corpora.manifests import write_cuts

FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".mp3": ("MP3", "MPEG_LAYER_III")}
FORMATS |= {".ogg": ("OGG", "VORBIS"), ".opus": ("OGG", "OPUS")}


@dataclass(frozen=True)
class SmallCorpus:
    """Indexed manifests of 16 kHz mono FLAC files."""

    train: Path
    validation: Path


def noise(seconds: float, *, rate: int = 16_000, seed: int = 0) -> NDArray[np.float32]:
    """White noise whose loudness rises and falls four times a second, as speech does."""
    samples = round(seconds * rate)
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * 4.0 * np.arange(samples) / rate)
    return (0.1 * envelope * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def tone(seconds: float, hertz: float, *, rate: int = 16_000) -> NDArray[np.float32]:
    """A sine."""
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_audio(path: Path, audio: NDArray[np.float32], *, rate: int = 16_000, subtype: str | None = None) -> Path:
    """Write samples [S] or [S, channels] in the format that the path's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    container, default = FORMATS[path.suffix.lower()]
    soundfile.write(path, audio, rate, format=container, subtype=subtype or default)
    return path


def write_text(path: Path) -> Path:
    """A file that is text, whatever its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("this is not audio\n" * 20)
    return path


def cut_of(path: Path, *, identifier: str | None = None) -> Cut:
    """The whole of a file as a cut."""
    return Recording.from_file(path, recording_id=identifier or path.stem).to_cut()


def write_manifest(path: Path, cuts: Sequence[Cut], *, index: bool = True) -> Path:
    """Write cuts, and the index beside them."""
    write_cuts(cuts, path)
    if index:
        build_index(path)
    return path
