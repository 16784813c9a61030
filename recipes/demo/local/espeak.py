"""Speak sentences with espeak-ng, one process per speaker.

espeak-ng keeps state between utterances (the phase of its pitch flutter, breath resonators, noise
generators) that no call resets, and seeds its noise generator from the clock. Each speaker therefore is a
new process with a seeded generator that speaks its sentences in a fixed order, so the audio is a function of
the voice and the sentences. A separate process also keeps messages of the library off the terminal.

This file contains both sides. Run as a script, it is the process of a speaker, so it imports only the
standard library at the top.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

_HEADER = struct.Struct("<I")

# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS_OUTPUT = 2
_DO_NOT_EXIT_ON_ERROR = 0x8000
_POSITION_IN_CHARACTERS = 1
_TEXT_IS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_PITCH, _PARAMETER_PITCH_RANGE, _PARAMETER_WORD_GAP = 1, 3, 4, 7


@dataclass(frozen=True)
class Voice:
    """The voice of a speaker: an espeak-ng voice (`en-us+f2`) and its settings."""

    name: str
    words_per_minute: int
    word_gap: int  # pause between words, in units of about 10 ms
    pitch: int  # 0 to 99, 50 is the voice's own
    pitch_range: int  # 0 (monotone) to 99, 50 is the voice's own
    noise_seed: int  # seeds the generator of fricatives, a non-negative 31-bit integer


class EspeakProcess:
    """One speaker: a context manager that converts sentences to samples, in order. `sampling_rate` is in Hz.

    Raises:
        UserError: espeakng_loader is not installed, or espeak-ng does not start.
    """

    def __init__(self, voice: Voice) -> None:
        library, data = locate_espeak()
        self._voice = voice
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        # espeak-ng truncates data paths to 160 characters; a short relative path always works.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(library), data.name, *_to_arguments(voice)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            cwd=data.parent,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._sentences: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self._audio: BinaryIO = self._process.stdout  # type: ignore[assignment]
        try:
            (self.sampling_rate,) = _HEADER.unpack(self._read(_HEADER.size))
        except BaseException:
            self.close()
            raise

    def speak(self, sentence: str) -> bytes:
        """The sentence as 16-bit little-endian mono samples at `sampling_rate`."""
        try:
            self._sentences.write(sentence.encode() + b"\n")
            self._sentences.flush()
        except BrokenPipeError:
            raise self._failure() from None
        (size,) = _HEADER.unpack(self._read(_HEADER.size))
        return self._read(size)

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._sentences.close()
        self._audio.close()
        self._messages.close()

    def __enter__(self) -> EspeakProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, size: int) -> bytes:
        received = self._audio.read(size)
        if len(received) != size:
            raise self._failure()
        return received

    def _failure(self) -> Exception:
        from w2vscale.errors import UserError

        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit status {code}"
        return UserError(
            f"espeak-ng failed with voice '{self._voice.name}': {reason}; "
            "reinstall it with pip install --force-reinstall 'w2vscale[synth]'"
        )


def locate_espeak() -> tuple[Path, Path]:
    """The paths of the espeak-ng library and its data folder.

    Raises:
        UserError: espeakng_loader is not installed.
    """
    from w2vscale.errors import UserError

    try:
        import espeakng_loader
    except ImportError:
        raise UserError(
            "synthetic speech needs espeak-ng, and espeakng_loader is not installed: pip install 'w2vscale[synth]'"
        ) from None
    return Path(espeakng_loader.get_library_path()).resolve(), Path(espeakng_loader.get_data_path()).resolve()


def _to_arguments(voice: Voice) -> list[str]:
    numbers = (voice.words_per_minute, voice.word_gap, voice.pitch, voice.pitch_range, voice.noise_seed)
    return [voice.name, *map(str, numbers)]


def _serve(library_path: str, data_path: str, name: str, *numbers: str) -> None:
    """The process of a speaker: for each line of text on stdin, write a byte count and the bytes of the samples."""
    audio = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints must not mix with the samples
    library = ctypes.CDLL(library_path)
    samples: list[bytes] = []

    def collect(waveform: int | None, count: int, events: int | None) -> int:
        if waveform and count:
            samples.append(ctypes.string_at(waveform, 2 * count))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(collect)

    sampling_rate = library.espeak_Initialize(_SYNCHRONOUS_OUTPUT, 0, data_path.encode(), _DO_NOT_EXIT_ON_ERROR)
    if sampling_rate <= 0:
        sys.exit(f"espeak_Initialize returned {sampling_rate}")
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(name.encode()) != 0:
        sys.exit(f"there is no voice '{name}'")
    words_per_minute, word_gap, pitch, pitch_range, noise_seed = map(int, numbers)
    library.espeak_SetParameter(_PARAMETER_RATE, words_per_minute, 0)
    library.espeak_SetParameter(_PARAMETER_WORD_GAP, word_gap, 0)
    library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
    library.espeak_SetParameter(_PARAMETER_PITCH_RANGE, pitch_range, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(noise_seed))
    audio.write(_HEADER.pack(sampling_rate))
    audio.flush()
    for line in sys.stdin.buffer:
        samples.clear()
        status = library.espeak_Synth(
            ctypes.c_char_p(line),
            ctypes.c_size_t(len(line) + 1),
            0,
            _POSITION_IN_CHARACTERS,
            0,
            _TEXT_IS_UTF8,
            None,
            None,
        )
        speech = b"".join(samples)
        if status != 0 or not speech:
            sys.exit(f"espeak_Synth returned {status} and {len(speech)} bytes of samples")
        audio.write(_HEADER.pack(len(speech)) + speech)
        audio.flush()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
