"""Read, check, crop and normalise the audio of one utterance."""

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
"""Allowed difference between decoded audio and its manifest in seconds: resampling and MP3 frames round."""

HEADER_TOLERANCE = 0.025
"""Allowed difference between the header of a file and its manifest in seconds."""

SEEKABLE_SUFFIXES = {".flac", ".wav"}
"""Formats in which every decoder seeks to the exact sample."""

BLOCK_SECONDS = 60
"""Long utterances are read in blocks of this many seconds."""

EPSILON = 1e-7
"""Added to the variance, as in the feature extractor of Transformers."""


class AudioError(ValueError):
    """The audio of an utterance cannot be used. The message is the reason; `kind` classifies it in a word or two."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def read_audio(cut: Cut, *, sampling_rate: int, offset: int, length: int, normalize: bool) -> NDArray[np.float32]:
    """Read `length` samples from sample `offset`, after resampling to `sampling_rate` (Hz) and averaging channels.

    `normalize` gives the whole utterance zero mean and unit variance before cropping. Memory does not depend on the
    duration of the utterance.

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
    if audio.min() == audio.max():  # a pause in a good utterance, or a silent utterance
        _refuse_silence(_blocks(wanted, whole, source=cut) if cropped else [audio])
    if normalize:
        mean, variance = _moments(_blocks(wanted, whole, source=cut))
        audio = ((audio - mean) / np.sqrt(variance + EPSILON)).astype(np.float32)
    return audio


def check_header(cut: Cut) -> None:
    """Compare an utterance with the header of its file, without decoding.

    Raises:
        AudioError: the file is missing, unreadable, or disagrees with the manifest.
    """
    recording = cut.recording
    if cut.start < 0 or cut.end > recording.duration + 1e-3:
        end = f"ends at {cut.end:.3f} s, after the end of its recording ({recording.duration:.3f} s)"
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
        raise AudioError(
            "mismatched", f"number of channels is {header.channels}, the manifest says {len(source.channels)}"
        )
    seconds = header.frames / header.samplerate
    if not recording.transforms and abs(seconds - recording.duration) > HEADER_TOLERANCE:
        raise AudioError("mismatched", f"duration is {seconds:.3f} s, the manifest says {recording.duration:.3f} s")


def libsndfile_reason(error: Exception) -> str:
    """The message of an error in one line, without the path of the file, which may be long."""
    return " ".join(str(getattr(error, "error_string", error)).split())[:200].removesuffix(".")


def standardize(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalise to zero mean and unit variance."""
    standard: NDArray[np.float32] = (audio - audio.mean()) / np.sqrt(audio.var() + EPSILON)
    return standard


def _blocks(cut: Cut, samples: int, *, source: Cut) -> Iterator[NDArray[np.float32]]:
    """Read a whole utterance in blocks."""
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
        audio = _read_file(cut) if _is_plain(cut) else _read_with_lhotse(cut)
    except Exception as error:
        raise AudioError("undecodable", _decoding_problem(source, error)) from None
    if audio.size == 0:
        raise AudioError("empty", "holds no audio")
    if abs(audio.size - samples) > LENGTH_TOLERANCE * cut.sampling_rate:
        raise AudioError("mismatched", f"has {audio.size} samples, the manifest says {samples}")
    if not np.isfinite(audio.sum()) and not np.isfinite(audio).all():
        raise AudioError("not finite", "holds samples that are not finite")
    return audio[:samples] if audio.size >= samples else np.pad(audio, (0, samples - audio.size))


def _is_plain(cut: Cut) -> bool:
    """Whether the cut is an untransformed part of one mono file in a seekable format."""
    recording = cut.recording
    source = recording.sources[0]
    return (
        isinstance(cut, MonoCut)
        and len(recording.sources) == len(source.channels) == 1
        and source.type == "file"
        and not recording.transforms
        and Path(source.source).suffix.lower() in SEEKABLE_SUFFIXES
    )


def _read_file(cut: Cut) -> NDArray[np.float32]:
    """The same samples as `_read_with_lhotse`, with fewer copies."""
    rate = cut.sampling_rate
    with soundfile.SoundFile(cut.recording.sources[0].source) as file:
        file.seek(compute_num_samples(cut.start, rate))
        audio: NDArray[np.float32] = file.read(compute_num_samples(cut.duration, rate), dtype="float32")
    return audio


def _read_with_lhotse(cut: Cut) -> NDArray[np.float32]:
    with _audio_backend(cut):
        audio = cut.load_audio()
    if audio is None:
        return np.empty(0, np.float32)
    return audio[0] if len(audio) == 1 else audio.mean(axis=0, dtype=np.float32)


@contextmanager
def _audio_backend(cut: Cut) -> Iterator[None]:
    """Decode audio in memory with libsndfile; Lhotse would choose torchaudio if installed, even if it does not load."""
    previous = get_current_audio_backend()
    if cut.recording.sources[0].type == "memory":
        set_current_audio_backend("LibsndfileBackend")
    try:
        yield
    finally:
        set_current_audio_backend(previous)


def _decoding_problem(cut: Cut, error: Exception) -> str:
    """Why a file with a correct header cannot be decoded, according to libsndfile.

    Lhotse also tries other libraries, and may report only that these are missing.
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
