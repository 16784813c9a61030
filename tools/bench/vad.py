"""How fast speech is found, compared with Silero VAD as its package offers it.

    python tools/bench/vad.py
    python tools/bench/vad.py --audio talk.flac --minutes 20

Both sides find the speech in the same audio with one thread, in turn. The model computes as long for noise as for
speech, so noise will do. Reading the file is part of our side only.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import torch
import typer

from tools.bench.script import console, run_script
from w2vscale.corpora.speech import RATE, find_speech
from w2vscale.data.audio import to_mono
from w2vscale.data.decoding import BLOCK, open_audio
from w2vscale.data.resampling import resampled


def vad(
    audio: Annotated[Path | None, typer.Option(help="An audio file instead of noise.")] = None,
    minutes: Annotated[float, typer.Option(help="Duration of the noise.")] = 10.0,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measurements; the median counts.")] = 5,
) -> None:
    """Measure how many seconds of audio a process searches for speech in a second."""
    from silero_vad import get_speech_timestamps, load_silero_vad

    with tempfile.TemporaryDirectory() as folder:
        path = audio or _noise(Path(folder) / "noise.wav", minutes)
        samples = torch.from_numpy(_samples(path))
        model: Any = load_silero_vad()
        ours, theirs = [], []
        for _ in range(repeats):
            began = time.perf_counter()
            find_speech(path)
            ours.append(time.perf_counter() - began)
            began = time.perf_counter()
            get_speech_timestamps(samples, model, sampling_rate=RATE)
            theirs.append(time.perf_counter() - began)
    seconds = samples.numel() / RATE
    for name, times in (("ours", ours), ("package", theirs)):
        console.print(f"{name:8} {seconds / statistics.median(times):7.1f} s of audio per second")
    ratio = statistics.median(long / short for short, long in zip(ours, theirs, strict=True))
    console.print(json.dumps({"ratio": round(ratio, 2), "seconds": round(seconds, 1)}))


def _noise(path: Path, minutes: float) -> Path:
    noise = 0.1 * np.random.default_rng(0).standard_normal(round(60 * minutes * RATE))
    soundfile.write(path, noise.astype(np.float32), RATE)
    return path


def _samples(path: Path) -> Any:
    with open_audio(path) as decoder:
        blocks = iter(lambda: decoder.read(BLOCK), None)
        mono = map(to_mono, takewhile(len, blocks))
        return np.concatenate([*resampled(mono, decoder.header.sampling_rate, RATE)])


if __name__ == "__main__":
    run_script(vad)
