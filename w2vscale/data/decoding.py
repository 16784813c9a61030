"""Decode audio files: most formats with libsndfile, and those of `FFMPEG_FORMATS` with FFmpeg through PyAV.

Which of them decodes a file depends on its suffix alone, so that it is the same on every machine.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np
import soundfile
from numpy.typing import NDArray

from w2vscale.data.truncation import missing_part
from w2vscale.storage.urls import scheme_of

Samples = NDArray[np.float32]

LIBSNDFILE_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        "wav wave bwf rf64 w64 flac ogg oga opus mp3 mp2 mpga",
        "aiff aif aifc au snd sph nist caf voc sds sf ircam paf pvf avr iff 8svx svx wve xi htk",
    )
    for name in names.split()
)
FFMPEG_FORMATS = {
    f".{name}": form
    for form, names in {
        "mov": "m4a m4b mp4 m4v mov 3gp 3g2",
        "matroska": "webm weba mka mkv",
        "asf": "wma wmv asf",
        "aac": "aac",
        "ac3": "ac3",
        "amr": "amr",
        "ape": "ape",
        "avi": "avi",
        "flv": "flv",
        "mpeg": "mpg mpeg",
        "ogg": "spx",
        "tta": "tta",
        "wv": "wv",
    }.items()
    for name in names.split()
}
"""FFmpeg's name of the container for each suffix. It is not detected: what FFmpeg detects can be a playlist of URLs."""

EXACT_DURATIONS = ("mov",)  # containers in which each track has its duration
STREAMS = ("aac", "ac3", "amr", "mpeg", "ogg")  # FFmpeg guesses their length from their size
AUDIO_SUFFIXES = LIBSNDFILE_SUFFIXES | FFMPEG_FORMATS.keys()
MPEG_SUFFIXES = (".mp3", ".mp2", ".mpga")
SEQUENTIAL = ("GSM", "G72", "NMS", "DWVW", "DPCM")  # first letters of encodings in which libsndfile cannot seek
LAST_PAGE = 20  # seconds; libsndfile seeks to a wrong place in the last page of an Ogg Vorbis file
RESERVOIR = 16 * 1152  # samples; frames of an MP3 need bits of some frames before them
BLOCK = 2**18  # samples that are decoded at a time
LARGE = 2**24  # samples; more are decoded in parts
UNKNOWN = 2**62  # samples; what libsndfile says if the header does not


class AudioError(ValueError):
    """The audio of an utterance cannot be used. The message is the reason; `kind` classifies it in a word or two."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Fetched(str):
    """The URL of encoded audio whose `content` is in memory. It goes wherever the path of an audio file may go."""

    content: bytes

    def __new__(cls, url: str, content: bytes) -> Fetched:
        fetched = super().__new__(cls, url)
        fetched.content = content
        return fetched

    @property
    def suffix(self) -> str:
        """The suffix in its path. Names in a store, unlike paths of a server, may have a ? or #."""
        path = urlsplit(self).path if scheme_of(self) in ("http", "https") else self
        return os.path.splitext(path)[1].lower()


class Header(NamedTuple):
    """What a file says about its audio. `samples` is per channel; if it is not exact, an estimate, or 0 if unknown."""

    sampling_rate: int  # Hz
    channels: int
    samples: int
    exact: bool


class Decoder(Protocol):
    """An open audio file. It is read from its beginning to its end."""

    header: Header

    def skip(self, samples: int) -> None:
        """Go on after the next `samples` samples."""

    def read(self, samples: int) -> Samples:
        """Decode the next samples, [samples, channels]; fewer at the end of the file."""


def is_audio(name: str) -> bool:
    """Whether a file is audio, by its suffix."""
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES


def _suffix(source: Any) -> str:
    """The suffix that decides how audio is decoded; "" for audio in a file object."""
    if isinstance(source, Fetched):
        return source.suffix
    return os.path.splitext(source)[1].lower() if isinstance(source, str | Path) else ""


def regular_file(path: str | Path) -> str:
    """The absolute path of a file; libsndfile takes `-` for stdin. Raises AudioError if it is no file or is empty.

    Pipes and devices are not files: reading them may never end. A file without a byte is named as that here: the words
    of the decoders for it differ.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character in the name
        raise AudioError("missing", "no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise AudioError("missing", "no such file")
    if not status.st_size:
        raise AudioError("empty", "not readable as audio: the file is empty")
    return os.path.abspath(path)


def _open_bytes(path: str) -> IO[bytes]:
    return open(path, "rb")


def check_name(path: str | Path) -> None:
    """Raise AudioError if the name of a file is not UTF-8: neither manifests nor libsndfile can have it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise AudioError("undecodable", "its name is not UTF-8: rename it") from None


def read_header(path: str | Path, *, count: bool = False) -> Header:
    """Read the header of an audio file. With `count`, decode it where the header does not have its exact length.

    Raises AudioError if the file is missing, unreadable, or cannot be decoded.
    """
    with open_audio(path) as decoder:
        header = decoder.header
        if header.exact or not count:
            return header
        samples = 0
        while size := len(decoder.read(BLOCK)):
            samples += size
    is_estimate = FFMPEG_FORMATS.get(_suffix(path)) not in EXACT_DURATIONS
    if samples < (0.9 if is_estimate else 1.0) * header.samples - 0.5 * header.sampling_rate:
        reason = f"a part of it is missing: ends after {samples} of about {header.samples} samples"
        raise AudioError("truncated", reason)
    return header._replace(samples=samples, exact=True)


@contextmanager
def open_audio(source: Any) -> Iterator[Decoder]:
    """Open an audio file by its path, or encoded audio in memory (`Fetched`) or in a file object.

    Raises AudioError if it is missing or unreadable, and for each error of the decoder while it is open.
    """
    opened = False
    try:
        with ExitStack() as stack:
            decoder: Decoder
            suffix, path, stored = _suffix(source), "", None
            again: Callable[[], IO[bytes]] | None = None
            if isinstance(source, Fetched):
                again = partial(io.BytesIO, source.content)
                if not source.content:
                    raise AudioError("empty", "not readable as audio: the object is empty")
            elif isinstance(source, str | Path):
                path = regular_file(source)
                again = partial(_open_bytes, path)
            if again is not None and (form := FFMPEG_FORMATS.get(suffix)) is not None:
                decoder = _Ffmpeg(stack.enter_context(again()), suffix, form, stack)
            else:
                if again is not None and (not path or suffix in MPEG_SUFFIXES):
                    stored = stack.enter_context(again())
                decoder = _Libsndfile(stack.enter_context(_SoundFile(stored or path or source)), stored, again)
            opened = True
            yield decoder
    except (soundfile.SoundFileError, OSError, UnicodeError) as error:
        problem = "cannot be decoded" if opened else "not readable as audio"
        raise AudioError("undecodable", f"{problem}: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """The decoder's own words for an error in one line, without the path of the file, which may be long."""
    words = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
    detail = getattr(error, "log", None)  # of FFmpeg: its level, the part that wrote it, and the message
    return " ".join(f"{words}{f' ({detail[2]})' if detail else ''}".split())[:200].removesuffix(".")


class _SoundFile(soundfile.SoundFile):
    """A file that `soundfile` only reads.

    Where it can, it seeks after each reading to where the file is anyway. That damages the next samples of an MP3, and
    fails in some encodings.
    """

    def seekable(self) -> bool:
        return False

    def can_seek(self) -> bool:
        """Whether `seek` works."""
        return not self.subtype.startswith(SEQUENTIAL) and bool(super().seekable())


class _Libsndfile:
    def __init__(self, file: _SoundFile, stored: IO[bytes] | None, again: Callable[[], IO[bytes]] | None) -> None:
        if file.format == "RAW":  # libsndfile takes any file with the suffix .au or .snd
            raise AudioError("undecodable", "not readable as audio: it has no header")
        if (missing := missing_part(file, again)) is not None:
            raise AudioError("truncated", f"a part of it is missing: {missing}")
        self.file = file
        self.stored = stored if file.format == "MP3" else None
        known = file.frames < UNKNOWN  # a FLAC that was written to a pipe does not know its length
        self.header = Header(file.samplerate, file.channels, file.frames if known else 0, exact=known)
        self.place = 0

    def skip(self, samples: int) -> None:
        target = self.place + samples
        if self.file.can_seek() and (near := self._safe(target)) > self.place:
            self.place = self.file.seek(near)
        while self.place < target and len(self.read(min(target - self.place, BLOCK))):
            pass

    def _safe(self, target: int) -> int:
        """The last sample up to `target` from which libsndfile decodes right after seeking to it."""
        if self.file.format == "MP3":
            return target - RESERVOIR
        if self.file.subtype == "VORBIS":
            return min(target, self.file.frames - LAST_PAGE * self.header.sampling_rate)
        return target

    def read(self, samples: int) -> Samples:
        samples = min(samples, max(self.file.frames - self.place, 0))
        parts = [np.empty((0, self.header.channels), np.float32)]
        while samples > 0:  # in parts, because the header may lie
            part = self.file.read(min(samples, LARGE), dtype="float32", always_2d=True)
            if not len(part):
                break
            parts.append(part)
            samples -= len(part)
            self.place += len(part)
        found = parts[-1] if len(parts) <= 2 else np.concatenate(parts)
        # libsndfile guesses the length of an MP3 without a Xing header. A frame starts with eleven ones.
        if self.stored and len(found) and self.place == self.file.frames and self.stored.read(2) >= b"\xff\xe0":
            raise AudioError("undecodable", f"longer than the {self.place} samples that libsndfile reports")
        return found


class _Ffmpeg:
    """The first audio track of a container."""

    def __init__(self, stored: IO[bytes], suffix: str, form: str, stack: ExitStack) -> None:
        try:
            import av
        except ImportError:
            raise AudioError("no decoder", f"{suffix} needs PyAV: pip install 'w2vscale[av]'") from None
        self._errors = (av.FFmpegError, ValueError)  # ValueError: the sampling rate or channels change in the file
        with self._own_words("not readable as audio"):
            container: Any = stack.enter_context(av.open(stored, "r", format=form))
        stream: Any = next(iter(container.streams.audio), None)
        if stream is None or stream.codec_context is None:
            raise AudioError("undecodable", "not readable as audio: has no audio track that FFmpeg decodes")
        context = stream.codec_context
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        if form in STREAMS:
            seconds = 0
        self.header = Header(context.sample_rate, context.channels, round(seconds * context.sample_rate), exact=False)
        self._as_float = av.AudioResampler(format="fltp", layout=context.layout, rate=context.sample_rate)
        self._frames: Iterator[Any] = container.decode(stream)
        self._rest = np.empty((0, context.channels), np.float32)

    def skip(self, samples: int) -> None:
        while samples > 0 and (size := len(self.read(min(samples, BLOCK)))):
            samples -= size

    def read(self, samples: int) -> Samples:
        blocks, size = [self._rest], len(self._rest)
        with self._own_words("cannot be decoded"):
            while size < samples and (frame := next(self._frames, None)) is not None:
                found = [block.to_ndarray().T for block in self._as_float.resample(frame)]
                blocks += found
                size += sum(map(len, found))
        decoded = np.concatenate(blocks)
        self._rest = decoded[samples:]
        return decoded[:samples]

    @contextmanager
    def _own_words(self, problem: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise AudioError("undecodable", f"{problem}: {reason_of(error)}") from None
