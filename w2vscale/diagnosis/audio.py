"""Which audio formats libsndfile decodes: a tone is encoded in memory, and decoded as training decodes it."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from w2vscale.diagnosis.finding import Finding, fail, ok, warn
from w2vscale.diagnosis.requirements import reinstall

Samples = NDArray[np.float32]

RATE = 48_000  # Hz; one of the few rates that Opus has
TONE = 440  # Hz

FORMATS = {  # by row of the report: format and encoding of libsndfile, and the corpora with such files
    "WAV": ("WAV", "PCM_16", "most corpora"),
    "FLAC": ("FLAC", "PCM_16", "LibriSpeech and shards"),
    "Ogg Vorbis": ("OGG", "VORBIS", ".ogg files"),
    "Opus": ("OGG", "OPUS", "GigaSpeech and .opus files"),
    "MP3": ("MP3", "MPEG_LAYER_III", "Common Voice"),
}
ESSENTIAL = ("WAV", "FLAC")


def decoders() -> Iterator[Finding]:
    """A finding for each format."""
    for name, (form, encoding, _) in FORMATS.items():
        try:
            problem = problem_with(_decoded(form, encoding))
        except Exception as error:  # of whatever kind: the report goes on with the next format
            problem = f"{type(error).__name__}: {error}"
        yield decoder_finding(name, problem)


def decoder_finding(name: str, problem: str) -> Finding:
    """The finding about a format. `problem`: why it is not decoded, or ""."""
    if not problem:
        return ok(name, "decoded")
    kind = fail if name in ESSENTIAL else warn
    found = f"not decoded, but used by {FORMATS[name][2]}: {problem}"
    return kind(name, found, reinstall("soundfile"))  # its wheels contain a libsndfile with all formats


def tone() -> Samples:
    """A second of it."""
    return (0.5 * np.sin(2 * np.pi * TONE / RATE * np.arange(RATE))).astype(np.float32)


def problem_with(decoded: Samples) -> str:
    """Why samples are not the tone; "" if they are."""
    if decoded.size < RATE // 2 or not decoded.any():
        return "decodes to silence"
    peak = int(np.abs(np.fft.rfft(decoded, RATE)).argmax())  # of a second, so in Hz
    return "" if abs(peak - TONE) < 10 else f"a tone of {TONE} Hz is decoded as one of {peak} Hz"


def _decoded(form: str, encoding: str) -> Samples:
    import soundfile

    from w2vscale.data.decoding import Fetched, open_audio

    encoded = io.BytesIO()
    soundfile.write(encoded, tone(), RATE, format=form, subtype=encoding)
    with open_audio(Fetched(f"memory://tone.{form.lower()}", encoded.getvalue())) as decoder:
        return decoder.read(2 * RATE)[:, 0]
