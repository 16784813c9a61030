"""Which audio formats this machine decodes: a tone is encoded in memory, and decoded as training decodes it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w2vscale.diagnosis.finding import Finding, fail, ok, warn
from w2vscale.diagnosis.software import is_installed

Samples = NDArray[np.float32]

RATE = 48_000  # Hz; one of the few rates that Opus has
TONE = 440.0  # Hz

LIBSNDFILE = {  # by row of the report: format and encoding of libsndfile, and the corpora with such files
    "WAV": ("WAV", "PCM_16", "most corpora"),
    "FLAC": ("FLAC", "PCM_16", "LibriSpeech and shards"),
    "Ogg Vorbis": ("OGG", "VORBIS", ".ogg files"),
    "Opus": ("OGG", "OPUS", "GigaSpeech and .opus files"),
    "MP3": ("MP3", "MPEG_LAYER_III", "Common Voice"),
}
ESSENTIAL = ("WAV", "FLAC")


def decoders() -> Iterator[Finding]:
    """Every format that libsndfile decodes, and one that FFmpeg does."""
    import soundfile

    for name, (form, subtype, used_by) in LIBSNDFILE.items():
        problem = problem_with(lambda form=form, subtype=subtype: _libsndfile(form, subtype))  # type: ignore[misc]
        yield decoder_finding(name, problem, used_by=used_by, library=soundfile.__libsndfile_version__)
    if not is_installed("av"):
        yield ok("m4a, mp4, webm", "PyAV is not installed; to decode such files: pip install 'w2vscale[av]'")
        return
    import av

    if (problem := problem_with(_ffmpeg)) is None:
        yield ok("m4a, mp4, webm", f"decoded by PyAV {av.__version__}")
    else:
        yield warn("m4a, mp4, webm", f"not decoded by PyAV {av.__version__}: {problem}", "pip install --upgrade av")


def decoder_finding(name: str, problem: str | None, *, used_by: str, library: str) -> Finding:
    """The finding about a format of libsndfile."""
    if problem is None:
        return ok(name, f"decoded by libsndfile {library}")
    kind = fail if name in ESSENTIAL else warn
    return kind(
        name,
        f"not decoded by libsndfile {library}, but used by {used_by}: {problem}",
        "pip install --upgrade soundfile; its wheels contain a libsndfile with all formats.",
    )


def problem_with(decode: Callable[[], Samples]) -> str | None:
    """Why what `decode` returns is not the tone; None if it is."""
    try:
        decoded = decode()
    except Exception as error:  # of whatever kind: the report goes on with the next format
        return f"{type(error).__name__}: {error}"
    spectrum = np.abs(np.fft.rfft(decoded))
    if decoded.size < RATE // 2 or not spectrum.any():
        return "decodes to silence"
    peak = float(np.fft.rfftfreq(decoded.size, 1 / RATE)[spectrum.argmax()])
    return None if abs(peak - TONE) < 0.02 * TONE else f"a tone of {TONE:.0f} Hz is decoded as one of {peak:.0f} Hz"


def _tone() -> Samples:
    """A second of it."""
    return (0.5 * np.sin(2 * np.pi * TONE / RATE * np.arange(RATE))).astype(np.float32)


def _libsndfile(form: str, subtype: str) -> Samples:
    import soundfile

    encoded = io.BytesIO()
    soundfile.write(encoded, _tone(), RATE, format=form, subtype=subtype)
    return _decoded(f"memory://tone.{form.lower()}", encoded.getvalue())


def _ffmpeg() -> Samples:
    import av

    encoded = io.BytesIO()
    with av.open(encoded, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=RATE)
        stream.layout = "mono"
        whole = av.AudioFrame.from_ndarray(_tone()[None], format="fltp", layout="mono")
        whole.sample_rate, whole.pts = RATE, 0
        convert = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=RATE, frame_size=1024)
        for frame in [*convert.resample(whole), *convert.resample(None)]:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return _decoded("memory://tone.m4a", encoded.getvalue())


def _decoded(name: str, content: bytes) -> Samples:
    from w2vscale.data.decoding import Fetched, open_audio

    with open_audio(Fetched(name, content)) as decoder:
        return decoder.read(2 * RATE)[:, 0]
