"""Read, check, crop and normalise the audio of one utterance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from lhotse.audio import AudioSource, Recording, backend
from lhotse.cut import Cut
from lhotse.utils import compute_num_samples, fastcopy

from w2vscale.data.decoding import AudioError, Fetched, Samples, open_audio, read_header, reason_of
from w2vscale.data.resampling import at_rate
from w2vscale.errors import counted
from w2vscale.storage.objects import Missing, TooLarge, read
from w2vscale.storage.urls import Url

LENGTH_TOLERANCE = 0.02  # seconds between decoded audio and its manifest: resampling and MP3 frames round
HEADER_TOLERANCE = 0.025  # seconds between the header of a file and its manifest
LONGEST = 2**62  # samples; more than any file has
CANCELLED = 1e-4  # channels cancel if the energy of their mean is below this fraction of their average energy
BLOCK_SECONDS = 60  # long utterances are read in blocks of this duration
SAMPLING_RATES = range(1000, 500_001)  # in Hz; a header with another value is taken to be damaged
RATES_IN_WORDS = f"a whole number from {SAMPLING_RATES[0]:,} to {SAMPLING_RATES[-1]:,}"
LARGEST_OBJECT = 2**30  # bytes; the content of a URL is read whole
EPSILON = 1e-7  # the default of model.waveform_eps


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
    Memory does not depend on the duration of a cropped utterance of a file. The content of a URL is held encoded.

    Raises AudioError if the file cannot be decoded, disagrees with its manifest, or holds no usable signal, and
    UserError if a URL cannot be read for a reason that is not in the object itself.
    """
    cut = fetched(cut)
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


def fetched(cut: Cut) -> Cut:
    """`cut` with the contents of the URLs of its recording, if it has any, which are decoded as files are.

    Raises AudioError if there is no such object or it is too large, and UserError if the store cannot be used.
    """
    recording = cut.recording
    if all(source.type != "url" for source in recording.sources):
        return cut
    sources = [
        AudioSource("file", source.channels, _fetch(source.source)) if source.type == "url" else source
        for source in recording.sources
    ]
    return fastcopy(cut, recording=fastcopy(recording, sources=sources))


def _fetch(url: str) -> Fetched:
    try:
        return Fetched(url, read(Url(url), limit=LARGEST_OBJECT))
    except Missing:
        raise AudioError("missing", "no such object") from None
    except TooLarge:
        raise AudioError("undecodable", f"has more than {LARGEST_OBJECT:,} bytes") from None


def check_header(cut: Cut) -> None:
    """Compare an utterance with the header of its file. Raises AudioError if it is missing, unreadable or different."""
    cut = fetched(cut)
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
    rate = int((recording.transforms and header.sampling_rate) or recording.sampling_rate)
    channels, seconds = len(source.channels), header.samples / header.sampling_rate
    if header.sampling_rate != rate:
        raise AudioError("mismatched", f"sampling rate is {header.sampling_rate} Hz, the manifest says {rate} Hz")
    if channels != header.channels:
        raise AudioError("mismatched", f"number of channels is {header.channels}, the manifest says {channels}")
    if header.exact and not recording.transforms and abs(seconds - recording.duration) > HEADER_TOLERANCE:
        raise AudioError("mismatched", f"duration is {seconds:.3f} s, the manifest says {recording.duration:.3f} s")


class _OwnDecoders(backend.LibsndfileBackend):
    """Decodes files, and audio in memory, as `open_audio` does. Its parent also looks into tar archives."""

    def read_audio(
        self, path_or_fd: Any, offset: float = 0.0, duration: float | None = None, **settings: object
    ) -> tuple[Samples, int]:
        with open_audio(path_or_fd) as decoder:
            rate, _, samples, exact = decoder.header
            decoder.skip(compute_num_samples(offset, rate) if offset > 0.0 else 0)
            whole = samples if exact else LONGEST
            return decoder.read(whole if duration is None else compute_num_samples(duration, rate)).T, rate

    def info(self, path_or_fd: Any, **settings: object) -> Any:
        rate, channels, samples, _ = read_header(path_or_fd, count=True)
        return backend.LibsndfileCompatibleAudioInfo(channels, samples, rate, samples / rate)


@contextmanager
def own_decoders() -> Iterator[None]:
    """Have Lhotse decode with `open_audio` alone.

    Its other decoders run programs, one with the name of the file in a shell command, or need torchaudio.
    """
    previous = backend.CURRENT_AUDIO_BACKEND
    backend.set_current_audio_backend(_OwnDecoders())
    try:
        yield
    finally:
        backend.CURRENT_AUDIO_BACKEND = previous


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
        audio = to_mono(_read_file(cut) if _is_plain(cut) else _read_with_lhotse(cut))
    except AudioError:
        raise
    except Exception as error:
        raise AudioError("undecodable", f"cannot be decoded: {_decoding_problem(source, error)}") from None
    if audio.size == 0:
        raise AudioError("empty", "holds no audio")
    if abs(audio.size - samples) > LENGTH_TOLERANCE * cut.sampling_rate:
        raise AudioError("mismatched", f"has {audio.size} of {samples} samples that the manifest says it has")
    if not np.isfinite(audio.sum()) and not np.isfinite(audio).all():
        raise AudioError("not finite", "contains samples that are not finite")
    return audio[:samples] if audio.size >= samples else np.pad(audio, (0, samples - audio.size))


def to_mono(audio_SC: Samples) -> Samples:
    """The mean of the channels. Raises AudioError if they cancel each other, as with a swapped polarity."""
    if audio_SC.shape[1] == 1:
        return audio_SC[:, 0]
    with np.errstate(invalid="ignore", over="ignore"):  # samples that are not finite
        audio = audio_SC.mean(axis=1, dtype=np.float32)
        energy, average = np.square(audio).mean(), np.square(audio_SC).mean()
    if energy < CANCELLED * average:
        raise AudioError(
            "cancelling", "its channels cancel each other in the mean; use one of them, with --channel first"
        )
    return audio


def check_channel(channels: int, channel: int | None) -> None:
    """Raise AudioError if audio with `channels` channels does not have number `channel`; None means the mean of all."""
    if channel is not None and channel >= channels:
        raise AudioError("mismatched", f"has {counted(channels, 'channel')}, numbered from 0, and no channel {channel}")


def one_channel(audio_SC: Samples, channel: int | None) -> Samples:
    """One of the channels, or their mean if `channel` is None. Raises AudioError like `to_mono`."""
    return to_mono(audio_SC if channel is None else audio_SC[:, [channel]])


def _is_plain(cut: Cut) -> bool:
    """Whether the cut is an untransformed part of one file."""
    recording = cut.recording
    return len(recording.sources) == 1 and recording.sources[0].type == "file" and not recording.transforms


def _read_file(cut: Cut) -> Samples:
    """The samples [samples, channels] that Lhotse reads, with fewer copies."""
    source, rate = cut.recording.sources[0], cut.sampling_rate
    channels = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    with open_audio(source.source) as decoder:
        decoder.skip(compute_num_samples(cut.start, rate))
        audio = decoder.read(compute_num_samples(cut.duration, rate))
    columns = [source.channels.index(channel) for channel in channels]
    return audio if columns == [*range(audio.shape[1])] else audio[:, columns]


def _read_with_lhotse(cut: Cut) -> Samples:
    with own_decoders():
        audio = cut.load_audio()
    return np.empty((0, 1), np.float32) if audio is None else audio.T


def _decoding_problem(cut: Cut, error: Exception) -> str:
    """Why a cut cannot be decoded: the error, or that a file ends early."""
    source = cut.recording.sources[0]
    if source.type == "file":
        try:
            samples = read_header(source.source, count=True).samples
        except AudioError as first:
            return str(first)
        if samples != cut.recording.num_samples:
            return f"ends after {samples} of {cut.recording.num_samples} samples"
    return reason_of(error)
