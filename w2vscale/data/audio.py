"""The audio of one utterance: read, check, crop, normalise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
from lhotse.audio.backend import get_current_audio_backend, set_current_audio_backend
from lhotse.cut import Cut, MonoCut
from lhotse.utils import compute_num_samples
from numpy.typing import NDArray

from w2vscale.data.manifest import audio_path
from w2vscale.data.resampling import at_rate

LENGTH_TOLERANCE = 0.02
"""Seconds by which decoded audio may differ from its manifest: resampling and MP3 frames round."""


HEADER_TOLERANCE = 0.025
"""Likewise, between a file's header and its manifest."""

PLAIN_SUFFIXES = {".flac", ".wav"}
"""Formats in which a position is a sample, whatever reads them."""

BLOCK_SECONDS = 60
"""What is read of a long utterance at a time."""

EPSILON = 1e-7
"""Added to the variance, as Transformers' feature extractor does."""


class AudioError(ValueError):
    """An utterance's audio cannot be used; the message is the reason, `kind` the kind of it in a word."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def read_audio(cut: Cut, *, sampling_rate: int, offset: int, length: int, normalize: bool) -> NDArray[np.float32]:
    """`length` samples of an utterance from sample `offset`, resampled to `sampling_rate` (Hz), channels averaged.

    With `normalize`, mean and variance are those of the whole utterance, before cropping. Memory is bounded however
    long the utterance is.

    Raises:
        AudioError: the file cannot be decoded, disagrees with its manifest, or holds no usable signal.
    """
    check_header(cut)
    wanted = at_rate(cut, sampling_rate)
    whole = round(cut.duration * sampling_rate)
    cropped = length < whole
    if normalize and (not cropped or whole <= BLOCK_SECONDS * sampling_rate):
        audio = _decode(wanted, whole, source=cut)
        _refuse_silence([audio])
        return standardize(audio)[offset : offset + length]
    part = wanted.truncate(offset=offset / sampling_rate, duration=length / sampling_rate, preserve_id=True)
    audio = _decode(part if cropped else wanted, length, source=cut)
    if audio.min() == audio.max():  # a pause in a good utterance, or an utterance without signal
        _refuse_silence(_blocks(wanted, whole, source=cut) if cropped else [audio])
    if normalize:
        mean, variance = _moments(_blocks(wanted, whole, source=cut))
        audio = ((audio - mean) / np.sqrt(variance + EPSILON)).astype(np.float32)
    return audio


def check_header(cut: Cut) -> None:
    """Compare an utterance with its file's header, without decoding.

    Raises:
        AudioError: the file does not hold what the manifest says.
    """
    recording = cut.recording
    if cut.start < 0 or cut.end > recording.duration + 1e-3:
        end = f"ends at {cut.end:.3f} s, after its recording's {recording.duration:.3f} s"
        raise AudioError("mismatched", end)
    source = recording.sources[0]
    if source.type != "file":
        return
    try:
        header = soundfile.info(str(source.source))
    except Exception as error:
        if not Path(str(source.source)).is_file():
            raise AudioError("missing", "no such file") from None
        raise AudioError("undecodable", f"not readable as audio: {libsndfile_reason(error)}") from None
    rate = int((recording.transforms and header.samplerate) or recording.sampling_rate)
    if header.samplerate != rate:
        raise AudioError("mismatched", f"sampling rate is {header.samplerate} Hz, the manifest says {rate} Hz")
    if len(source.channels) != header.channels:
        raise AudioError("mismatched", f"has {header.channels} channels, the manifest says {len(source.channels)}")
    seconds = header.frames / header.samplerate
    if not recording.transforms and abs(seconds - recording.duration) > HEADER_TOLERANCE:
        raise AudioError("mismatched", f"duration is {seconds:.3f} s, the manifest says {recording.duration:.3f} s")


def libsndfile_reason(error: Exception) -> str:
    """An error in one line, without the file's path, which may be long."""
    return " ".join(str(getattr(error, "error_string", error)).split())[:200].removesuffix(".")


def standardize(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """Zero mean and unit variance."""
    standard: NDArray[np.float32] = (audio - audio.mean()) / np.sqrt(audio.var() + EPSILON)
    return standard


def _blocks(cut: Cut, samples: int, *, source: Cut) -> Iterator[NDArray[np.float32]]:
    """All of an utterance, a minute at a time."""
    rate = cut.sampling_rate
    for start in range(0, samples, BLOCK_SECONDS * rate):
        length = min(BLOCK_SECONDS * rate, samples - start)
        part = cut.truncate(offset=start / rate, duration=length / rate, preserve_id=True)
        yield _decode(part, length, source=source)


def _moments(blocks: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    """Mean and variance of all samples."""
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:
        count += block.size
        total += float(block.sum(dtype=np.float64))
        squares += float(np.square(block, dtype=np.float64).sum())
    return total / count, max(squares / count - (total / count) ** 2, 0.0)


def _refuse_silence(blocks: Iterable[NDArray[np.float32]]) -> None:
    bounds = [(block.min(), block.max()) for block in blocks]
    if min(low for low, _ in bounds) == max(high for _, high in bounds):
        raise AudioError("silent", "is silent: all samples are equal")


def _decode(cut: Cut, samples: int, *, source: Cut) -> NDArray[np.float32]:
    try:
        audio = _read_file(cut) if _is_plain(cut) else _read_by_lhotse(cut)
    except Exception as error:
        raise AudioError("undecodable", _decoding_problem(source, error)) from None
    if audio.size == 0:
        raise AudioError("empty", "holds no audio")
    if abs(audio.size - samples) > LENGTH_TOLERANCE * cut.sampling_rate:
        raise AudioError("mismatched", f"lasts {audio.size} samples, not {samples} as its manifest says")
    if not np.isfinite(audio.sum()) and not np.isfinite(audio).all():
        raise AudioError("not finite", "holds samples that are not finite")
    return audio[:samples] if audio.size >= samples else np.pad(audio, (0, samples - audio.size))


def _is_plain(cut: Cut) -> bool:
    """Whether it is a part of one mono file, as it is there."""
    recording = cut.recording
    source = recording.sources[0]
    return (
        isinstance(cut, MonoCut)
        and len(recording.sources) == len(source.channels) == 1
        and source.type == "file"
        and not recording.transforms
        and Path(source.source).suffix.lower() in PLAIN_SUFFIXES
    )


def _read_file(cut: Cut) -> NDArray[np.float32]:
    """What `_read_by_lhotse` gives, without its copies."""
    rate = cut.sampling_rate
    with soundfile.SoundFile(cut.recording.sources[0].source) as file:
        file.seek(compute_num_samples(cut.start, rate))
        audio: NDArray[np.float32] = file.read(compute_num_samples(cut.duration, rate), dtype="float32")
    return audio


def _read_by_lhotse(cut: Cut) -> NDArray[np.float32]:
    with _audio_backend(cut):
        audio = cut.load_audio()
    if audio is None:
        return np.empty(0, np.float32)
    return audio[0] if len(audio) == 1 else audio.mean(axis=0, dtype=np.float32)


@contextmanager
def _audio_backend(cut: Cut) -> Iterator[None]:
    """libsndfile for audio in memory, where Lhotse would choose torchaudio if it is installed, working or not."""
    previous = get_current_audio_backend()
    if cut.recording.sources[0].type == "memory":
        set_current_audio_backend("LibsndfileBackend")
    try:
        yield
    finally:
        set_current_audio_backend(previous)


def _decoding_problem(cut: Cut, error: Exception) -> str:
    """Why a file whose header is right cannot be decoded.

    Asks libsndfile: Lhotse goes on to other libraries, and may report no more than that they are missing.
    """
    if cut.recording.sources[0].type != "file":
        return f"cannot be decoded: {libsndfile_reason(error)}"
    try:
        frames = len(soundfile.read(audio_path(cut))[0])
    except Exception as first:
        return f"cannot be decoded: {libsndfile_reason(first)}"
    if frames != cut.recording.num_samples:
        return f"cannot be decoded: ends after {frames} of {cut.recording.num_samples} samples"
    return f"cannot be decoded: {libsndfile_reason(error)}"
