"""Find speech in a recording with Silero VAD (https://github.com/snakers4/silero-vad)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from w2vscale.corpora.segments import Segment
from w2vscale.data.audio import check_channel, one_channel
from w2vscale.data.decoding import BLOCK, AudioError, Decoder, Samples, open_audio
from w2vscale.data.resampling import resampled
from w2vscale.errors import UserError

RATE = 16_000  # Hz
FRAME = 512  # samples for which the model gives one probability of speech
AUDIBLE = 0.01  # the highest sample of a second that is not almost silent: there, rounding hides that channels cancel
PAD_MS = 300  # milliseconds that are added before and after speech

# A recording is cut into pieces that are computed side by side, which is seven times faster than one after another.
PIECE = 1000  # frames (32 s)
RUN_IN = 100  # frames (3.2 s) that are computed before each piece, to get the state of the model there
PIECES = 32  # computed at a time


def find_speech(path: Path, *, channel: int | None = None) -> list[Segment]:
    """The parts of an audio file that are speech, in seconds, sorted and without overlap.

    `channel` is the channel to listen to; None means the mean of all. Memory does not depend on the duration. Raises
    AudioError if the file cannot be decoded or does not have the channel, and UserError if silero-vad is not installed.
    """
    with _one_thread(), torch.inference_mode(), open_audio(path) as decoder:
        check_channel(decoder.header.channels, channel)
        model, to_segments = _silero()
        audio = resampled(_mono(decoder, channel), decoder.header.sampling_rate, RATE)
        found, samples = [], 0
        run_in = np.zeros(RUN_IN * FRAME, np.float32)
        for stretch in _joined(audio, PIECES * PIECE * FRAME):
            samples += stretch.size
            stretch = np.concatenate([run_in, stretch, np.zeros(-stretch.size % FRAME, np.float32)])
            found.append(_probabilities(model, stretch.reshape(-1, FRAME)))
            run_in = stretch[-run_in.size :]
    probabilities = np.concatenate([np.zeros(0, np.float32), *found]).tolist()
    parts = to_segments(probabilities, sampling_rate=RATE, speech_pad_ms=PAD_MS, audio_length_samples=samples)
    return [Segment(part["start"] / RATE, part["end"] / RATE) for part in parts]


def _mono(decoder: Decoder, channel: int | None) -> Iterator[Samples]:
    """The audio to listen to. In seconds in which the channels cancel each other in the mean, that is the first one.

    So speech is found there, too, and its segment is named when it is read. Raises AudioError if all seconds cancel
    that are not almost silent, or samples are not finite.
    """
    rate, heard, cancelled, last = decoder.header.sampling_rate, 0, 0, None
    while len(block := decoder.read(BLOCK)):
        parts = []
        for second in np.split(block, range(rate, len(block), rate)):
            is_heard = bool(np.abs(second).max() > AUDIBLE)
            heard += is_heard
            try:
                parts.append(one_channel(second, channel))
            except AudioError as error:
                parts.append(second[:, 0])
                cancelled, last = cancelled + is_heard, error
        audio = np.concatenate(parts)
        if not np.isfinite(audio).all():  # the model would hear no speech from there on
            raise AudioError("not finite", "contains samples that are not finite")
        yield audio
    if last is not None and cancelled == heard:
        raise last


def _joined(blocks: Iterator[Samples], size: int) -> Iterator[Samples]:
    """The same samples in blocks of `size`; the last one may be shorter."""
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while held.size >= size:
            yield held[:size]
            held = held[size:]
    if held.size:
        yield held


def _probabilities(model: Any, frames: Samples) -> NDArray[np.float32]:
    """The probability of speech in each of the frames [frames, FRAME] after the first RUN_IN."""
    count = len(frames) - RUN_IN
    size = min(PIECE, count)
    padded = np.pad(frames, ((0, -count % size), (0, 0)))
    pieces = [padded[start : start + RUN_IN + size] for start in range(0, count, size)]
    side_by_side = torch.from_numpy(np.stack(pieces, axis=1))
    model.reset_states()
    found = torch.cat([model(frame, RATE) for frame in side_by_side], dim=1)
    return found[:, RUN_IN:].reshape(-1)[:count].numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: silero-vad sets this for the whole process, and the frames are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _silero() -> tuple[Any, Any]:
    try:
        from silero_vad import get_speech_timestamps_from_probs, load_silero_vad
    except ImportError:
        raise UserError("--vad needs silero-vad: pip install 'w2vscale[vad]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.load is deprecated
        return load_silero_vad(), get_speech_timestamps_from_probs
