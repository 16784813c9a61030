"""Read, check, crop and normalise the audio of one utterance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse.audio import AudioSource, Recording, backend
from lhotse.cut import Cut, MonoCut
from lhotse.utils import compute_num_samples

from w2vscale.data.resampling import Samples, at_rate

LENGTH_TOLERANCE = 0.02  # seconds between decoded audio and its manifest: resampling and MP3 frames round
HEADER_TOLERANCE = 0.025  # seconds between the header of a file and its manifest
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}
SEEKABLE_SUFFIXES = {".flac", ".wav"}  # formats in which every decoder seeks to the exact sample
BLOCK_SECONDS = 60  # long utterances are read in blocks of this duration
SAMPLING_RATES = range(1000, 500_001)  # in Hz; a header with another value is taken to be damaged
RATES_IN_WORDS = f"a whole number from {SAMPLING_RATES[0]:,} to {SAMPLING_RATES[-1]:,}"
EPSILON = 1e-7  # the default of model.waveform_eps


class AudioError(ValueError):
    """The audio of an utterance cannot be used. The message is the reason; `kind` classifies it in a word or two."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def read_audio(
    cut: Cut,
    *,
    sampling_rate: int,
    offset: int = 0,
    length: int | None = None,
    normalize: bool = False,
    eps: float = EPSILON,
) -> Samples:
    """Read `length` samples (default: all) from sample `offset`, resampled to `sampling_rate` (Hz) and mixed to mono.

    `normalize` gives the whole utterance zero mean and unit variance before cropping; `eps` is added to its variance.
    Memory does not depend on the duration of a cropped utterance.

    Raises AudioError if the file cannot be decoded, disagrees with its manifest, or holds no usable signal.
    """
    check_header(cut)
    wanted = at_rate(cut, sampling_rate)
    whole = round(cut.duration * sampling_rate)
    length = whole if length is None else length
    if length >= whole or (normalize and whole <= BLOCK_SECONDS * sampling_rate):
        audio = _decode(wanted, max(whole, length), source=cut)
        _refuse_silence(audio.min(), audio.max())
        return standardize(audio, eps)[offset : offset + length] if normalize else audio
    audio = _decode(wanted, length, source=cut, start=offset)
    if normalize or audio.min() == audio.max():  # a pause in a good utterance, or a silent utterance
        mean, deviation = _mean_and_deviation(wanted, whole, source=cut, eps=eps)
        audio = ((audio - mean) / deviation).astype(np.float32) if normalize else audio
    return audio


def check_header(cut: Cut) -> None:
    """Compare an utterance with the header of its file. Raises AudioError if it is missing, unreadable or different."""
    recording = cut.recording
    if cut.start < 0 or cut.end > recording.duration + 1e-3:
        end = f"ends at {cut.end:.3f} s, after the end of its recording ({recording.duration:.3f} s)"
        raise AudioError("mismatched", end)
    wanted = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    has = recording.channel_ids
    if not recording.transforms:  # reverberation may add channels
        has = [channel for source in recording.sources for channel in source.channels]
    if not {*wanted} <= {*recording.channel_ids} <= {*has}:
        raise AudioError("mismatched", f"has channels {wanted} of a recording with channels {has}")
    if recording.sampling_rate not in SAMPLING_RATES:
        raise AudioError("sampling rate", f"sampling rate is {recording.sampling_rate} Hz, not {RATES_IN_WORDS}")
    for source in recording.sources:
        if source.type != "memory":
            _check_file(source, recording)


def _check_file(source: AudioSource, recording: Recording) -> None:
    header = read_header(source.source)
    rate = int((recording.transforms and header.samplerate) or recording.sampling_rate)
    channels, seconds = len(source.channels), header.frames / header.samplerate
    if header.samplerate != rate:
        raise AudioError("mismatched", f"sampling rate is {header.samplerate} Hz, the manifest says {rate} Hz")
    if channels != header.channels:
        raise AudioError("mismatched", f"number of channels is {header.channels}, the manifest says {channels}")
    if not recording.transforms and abs(seconds - recording.duration) > HEADER_TOLERANCE:
        raise AudioError("mismatched", f"duration is {seconds:.3f} s, the manifest says {recording.duration:.3f} s")


def read_header(path: str | Path) -> Any:
    """The header of an audio file, as `soundfile.info`. Raises AudioError if it is missing or unreadable."""
    try:
        return soundfile.info(regular_file(path))
    except AudioError:
        raise
    except Exception as error:  # libsndfile, and names that cannot be encoded
        raise AudioError("undecodable", f"not readable as audio: {libsndfile_reason(error)}") from None


def regular_file(path: str | Path) -> str:
    """The absolute path of a file; libsndfile takes `-` for stdin. Raises AudioError if there is no such file.

    Pipes and devices are not files: reading them may never end.
    """
    if not os.path.isfile(path):
        raise AudioError("missing", "no such file")
    return os.path.abspath(path)


class _Libsndfile(backend.LibsndfileBackend):
    """Decodes files, and audio in memory, with libsndfile. Its parent also looks into tar archives."""

    def read_audio(
        self, path_or_fd: Any, offset: float = 0.0, duration: float | None = None, **settings: object
    ) -> tuple[Samples, int]:
        given = regular_file(path_or_fd) if isinstance(path_or_fd, str | Path) else path_or_fd
        with soundfile.SoundFile(given) as file:
            if offset > 0.0:
                file.seek(compute_num_samples(offset, file.samplerate))
            samples = -1 if duration is None else compute_num_samples(duration, file.samplerate)
            return file.read(samples, dtype="float32", always_2d=True).T, file.samplerate

    def info(self, path_or_fd: Any, **settings: object) -> Any:
        header = read_header(path_or_fd)
        return backend.LibsndfileCompatibleAudioInfo(header.channels, header.frames, header.samplerate, header.duration)


@contextmanager
def only_libsndfile() -> Iterator[None]:
    """Have Lhotse decode with libsndfile alone.

    Its other decoders run programs, one with the name of the file in a shell command, or need torchaudio.
    """
    previous = backend.CURRENT_AUDIO_BACKEND
    backend.set_current_audio_backend(_Libsndfile())
    try:
        yield
    finally:
        backend.CURRENT_AUDIO_BACKEND = previous


def libsndfile_reason(error: Exception) -> str:
    """The message of an error in one line, without the path of the file, which may be long."""
    return " ".join(str(getattr(error, "error_string", error)).split())[:200].removesuffix(".")


def standardize(audio: Samples, eps: float = EPSILON) -> Samples:
    """Normalise to zero mean and unit variance."""
    standard: Samples = (audio - audio.mean()) / np.sqrt(audio.var() + eps)
    return standard


def _refuse_silence(low: float, high: float) -> None:
    if low == high:
        raise AudioError("silent", "is silent: all samples are equal")


def _mean_and_deviation(cut: Cut, samples: int, *, source: Cut, eps: float) -> tuple[float, float]:
    """Mean and standard deviation of a whole utterance, read in blocks. Raises AudioError if it is silent."""
    total, squares, low, high = 0.0, 0.0, np.inf, -np.inf
    size = BLOCK_SECONDS * cut.sampling_rate
    for start in range(0, samples, size):
        block = _decode(cut, min(size, samples - start), source=source, start=start)
        total += float(block.sum(dtype=np.float64))
        squares += float(np.square(block, dtype=np.float64).sum())
        low, high = min(low, block.min()), max(high, block.max())
    _refuse_silence(low, high)
    mean = total / samples
    return mean, np.sqrt(max(squares / samples - mean**2, 0.0) + eps)


def _decode(cut: Cut, samples: int, *, source: Cut, start: int | None = None) -> Samples:
    """Decode `samples` samples from sample `start`, or the whole cut."""
    rate = cut.sampling_rate
    try:
        if start is not None:
            cut = cut.truncate(offset=start / rate, duration=samples / rate, preserve_id=True)
        audio = _read_file(cut) if _is_plain(cut) else _read_with_lhotse(cut)
    except Exception as error:
        raise AudioError("undecodable", f"cannot be decoded: {_decoding_problem(source, error)}") from None
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


def _read_file(cut: Cut) -> Samples:
    """The same samples as `_read_with_lhotse`, with fewer copies."""
    rate = cut.sampling_rate
    with soundfile.SoundFile(regular_file(cut.recording.sources[0].source)) as file:
        file.seek(compute_num_samples(cut.start, rate))
        audio: Samples = file.read(compute_num_samples(cut.duration, rate), dtype="float32")
    return audio


def _read_with_lhotse(cut: Cut) -> Samples:
    with only_libsndfile():
        audio = cut.load_audio()
    if audio is None:
        return np.empty(0, np.float32)
    return audio[0] if len(audio) == 1 else audio.mean(axis=0, dtype=np.float32)


def _decoding_problem(cut: Cut, error: Exception) -> str:
    """Why a cut cannot be decoded: the error, or that a file ends early."""
    source = cut.recording.sources[0]
    if source.type == "file":
        try:
            frames = len(soundfile.read(regular_file(source.source))[0])
        except Exception as first:
            return libsndfile_reason(first)
        if frames != cut.recording.num_samples:
            return f"ends after {frames} of {cut.recording.num_samples} samples"
    return libsndfile_reason(error)
