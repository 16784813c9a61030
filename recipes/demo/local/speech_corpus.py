"""A small corpus of synthetic English speech in the layout of LibriSpeech: the same arguments give the same bytes.

The speakers and their sentences are pure functions of the arguments. Each speaker is one espeak-ng process
(see `espeak.py`); threads drive these processes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse.augmentation import get_or_create_resampler
from numpy.typing import NDArray

from espeak import EspeakProcess, Voice, locate_espeak
from sentences import Text, draw_sentence, transcript
from w2vscale.errors import UserError
from w2vscale.files import write_text, writing

SAMPLING_RATE = 16_000
SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 15.0
UTTERANCES_PER_CHAPTER = 40
FIRST_SPEAKER = 1001
RECIPE = 1  # increase it when a change makes the same arguments give different audio
STAMP = "synthesis.json"

ACCENTS = (
    "en-us",
    "en",  # en-gb: in `VOICE+VARIANT`, espeak-ng expects the file name of the voice
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-us-nyc",
    "en-029",
)
VARIANTS = ("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7")


@dataclass(frozen=True)
class Speaker:
    """One speaker of one part: a voice, a loudness and an amount of speech."""

    identifier: int
    part: str
    sex: str  # F or M
    voice: Voice
    gain_decibels: float
    mains_hertz: float
    seconds: float  # the least to speak; the last utterance may exceed it


@dataclass(frozen=True)
class SpeakerTotal:
    """The speech that was synthesised for one speaker."""

    speaker: Speaker
    utterances: int
    seconds: float


@dataclass(frozen=True)
class SynthesisSummary:
    """The size of a corpus, and whether this call created it or found it complete."""

    corpus: Path  # the LibriSpeech folder, for `prepare_librispeech`
    speakers: int
    utterances: int
    seconds: float
    created: bool


def synthesise_corpus(
    output: Path,
    *,
    parts: Mapping[str, float],
    speakers_per_part: int | None = None,
    text: Text = "sentences",
    hum: bool = True,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> SynthesisSummary:
    """Write a corpus in the layout of LibriSpeech: 16 kHz, 16 bit, mono FLAC, transcripts and SPEAKERS.TXT.

    The files are `output/LibriSpeech/PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac`. A complete corpus of the same
    arguments is kept as it is. A new one gets its name only when it is complete.

    Args:
        output: A folder that is missing, empty, or holds the corpus of these arguments.
        parts: Minutes of speech for each part. A part has at least these minutes, and at most one more utterance per
            speaker. No speaker is in two parts.
        speakers_per_part: Default: one per minute, between 4 and 64.
        text: Whether the speakers say sentences or strings of digits.
        hum: Add mains hum to all speech.
        seed: Determines voices, text and noise.
        jobs: Speakers to synthesise in parallel; does not change the files.
        progress: Called in this thread with (finished speakers, all speakers).

    Raises:
        UserError: arguments out of range; a folder that holds something else or cannot be written; no espeak-ng.
    """
    speakers = draw_speakers(parts, speakers_per_part=speakers_per_part, seed=seed)
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    arguments = {
        "recipe": RECIPE,
        "parts": {part: float(minutes) for part, minutes in parts.items()},
        "speakers": {part: sum(speaker.part == part for speaker in speakers) for part in parts},
        "text": text,
        "hum": hum,
        "seed": seed,
    }
    corpus = output / "LibriSpeech"
    unfinished = output / "LibriSpeech.unfinished"
    with writing(output):
        if found := _find_corpus(output, corpus, unfinished, arguments):
            return found
        locate_espeak()
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            totals = _synthesise_speakers(
                speakers, unfinished, text=text, hum=hum, seed=seed, jobs=jobs, progress=progress
            )
            write_text(unfinished / "SPEAKERS.TXT", speakers_table(totals))
            summary = SynthesisSummary(
                corpus=corpus,
                speakers=len(totals),
                utterances=sum(total.utterances for total in totals),
                seconds=sum(total.seconds for total in totals),
                created=True,
            )
            _write_stamp(unfinished, arguments, summary)
            unfinished.rename(corpus)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return summary


def draw_speakers(parts: Mapping[str, float], *, speakers_per_part: int | None = None, seed: int = 0) -> list[Speaker]:
    """The speakers of all parts: a pure function that does not depend on the order of `parts`.

    Voices are drawn without replacement, so the first 96 speakers all have different ones.

    Raises:
        UserError: arguments out of range.
    """
    _check_arguments(parts, speakers_per_part, seed)
    generator = random.Random(f"speakers {seed}")
    names = [f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS]
    generator.shuffle(names)
    speakers: list[Speaker] = []
    for part in sorted(parts):
        count = speakers_per_part or min(64, max(4, round(parts[part])))
        for _ in range(count):
            name = names[len(speakers) % len(names)]
            voice = Voice(
                name=name,
                words_per_minute=generator.randint(110, 160),
                word_gap=generator.randint(8, 25),
                pitch=generator.randint(35, 65),
                pitch_range=generator.randint(35, 75),
                noise_seed=generator.getrandbits(31),
            )
            speakers.append(
                Speaker(
                    identifier=FIRST_SPEAKER + len(speakers),
                    part=part,
                    sex=name.rpartition("+")[2][0].upper(),
                    voice=voice,
                    gain_decibels=generator.uniform(-14.0, -3.0),
                    mains_hertz=generator.choice((50.0, 60.0)),
                    seconds=parts[part] * 60.0 / count,
                )
            )
    return speakers


def speakers_table(totals: Sequence[SpeakerTotal]) -> str:
    """The text of LibriSpeech's SPEAKERS.TXT."""
    lines = [
        "; Synthetic speakers made by w2vscale with espeak-ng",
        ";ID  |SEX| SUBSET           |MINUTES| NAME",
    ]
    for total in totals:
        speaker = total.speaker
        minutes = f"{total.seconds / 60.0:.2f}"
        columns = (f"{speaker.identifier:<4}", speaker.sex, f"{speaker.part:<16}", f"{minutes:<5}")
        lines.append(" | ".join((*columns, speaker.voice.name)))
    return "\n".join(lines) + "\n"


def finish_audio(
    speech: NDArray[np.float32], *, gain_decibels: float, mains_hertz: float | None, generator: np.random.Generator
) -> NDArray[np.int16]:
    """Add noise, and hum unless `mains_hertz` is None, 25 to 35 dB below speech in [-1, 1]; apply the gain.

    Returns 16-bit samples.
    """
    loudness = math.sqrt(float(np.mean(np.square(speech))))
    hum = mains_hum(len(speech), mains_hertz, generator) if mains_hertz is not None else 0.0
    background = hum + 0.3 * room_noise(len(speech), generator)
    level = loudness * 10.0 ** (-generator.uniform(25.0, 35.0) / 20.0)
    scaled = (speech + level * background) * (32767.0 * 10.0 ** (gain_decibels / 20.0))
    return np.clip(np.rint(scaled), -32768, 32767).astype(np.int16)


def mains_hum(samples: int, hertz: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """Hum of about unit power at the mains frequency and its first overtones, as in amateur recordings."""
    harmonics = np.arange(1, 6)
    phases = 2.0 * np.pi * (np.outer(harmonics, np.arange(samples) * hertz / SAMPLING_RATE) + generator.random((5, 1)))
    return np.sqrt(2.0) * (np.sin(phases) / harmonics[:, None]).sum(axis=0) / math.sqrt(sum(1.0 / harmonics**2))


def room_noise(samples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Noise of unit power that falls by 6 dB per octave above 40 Hz, as room noise does."""
    spectrum = np.fft.rfft(generator.standard_normal(samples))
    hertz = np.arange(spectrum.size) * (SAMPLING_RATE / samples)
    noise = np.fft.irfft(spectrum / np.maximum(hertz, 40.0), samples)
    return noise / noise.std()


def _check_arguments(parts: Mapping[str, float], speakers_per_part: int | None, seed: int) -> None:
    if not parts:
        raise UserError("no part to synthesise: name at least one, such as train-clean-5 with 12 minutes")
    for part, minutes in parts.items():
        if not re.fullmatch(r"\w[\w.-]*", part, flags=re.ASCII):
            raise UserError(f"part '{part}' cannot be the name of a folder: use letters, digits, '-', '_' and '.'")
        if not (math.isfinite(minutes) and minutes > 0):
            raise UserError(f"{minutes:g} minutes of speech for part '{part}': must be more than 0")
    if speakers_per_part is not None and speakers_per_part < 1:
        raise UserError(f"--speakers {speakers_per_part}: must be at least 1")
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")


def _find_corpus(output: Path, corpus: Path, unfinished: Path, arguments: Mapping[str, Any]) -> SynthesisSummary | None:
    """The complete corpus of these arguments, or None if `output` is empty.

    Raises:
        UserError: `output` holds something else.
    """
    if not output.exists() or all(entry == unfinished for entry in output.iterdir()):
        return None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, KeyError, json.JSONDecodeError):
        stamp = json.loads((corpus / STAMP).read_text(encoding="utf-8"))
        files = sum(1 for _ in corpus.rglob("*.flac"))
        if stamp["arguments"] == arguments and stamp["utterances"] == files:
            return SynthesisSummary(corpus, stamp["speakers"], files, stamp["seconds"], created=False)
    raise UserError(
        f"{output} is not empty and does not hold the complete synthetic corpus of these arguments: "
        "choose another folder or delete this one"
    )


def _write_stamp(corpus: Path, arguments: Mapping[str, Any], summary: SynthesisSummary) -> None:
    stamp = {
        "arguments": arguments,
        "speakers": summary.speakers,
        "utterances": summary.utterances,
        "seconds": summary.seconds,
    }
    write_text(corpus / STAMP, json.dumps(stamp, indent=2, sort_keys=True) + "\n")


def _synthesise_speakers(
    speakers: Sequence[Speaker],
    corpus: Path,
    *,
    text: Text,
    hum: bool,
    seed: int,
    jobs: int,
    progress: Callable[[int, int], None] | None,
) -> list[SpeakerTotal]:
    stop = threading.Event()
    with _one_torch_thread(), ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(_synthesise_speaker, speaker, corpus, text, hum, seed, stop) for speaker in speakers]
        try:
            for finished, future in enumerate(as_completed(work), start=1):
                future.result()
                if progress is not None:
                    progress(finished, len(speakers))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in work]


def _synthesise_speaker(
    speaker: Speaker, corpus: Path, text: Text, hum: bool, seed: int, stop: threading.Event
) -> SpeakerTotal:
    """Speak sentences until `speaker.seconds` are reached or `stop` is set, and write the files of this speaker."""
    sentences = random.Random(f"sentences {seed} {speaker.identifier}")
    lines: dict[Path, list[str]] = {}
    utterances, seconds = 0, 0.0
    with EspeakProcess(speaker.voice) as espeak:
        resample = get_or_create_resampler(espeak.sampling_rate, SAMPLING_RATE)
        while seconds < speaker.seconds and not stop.is_set():
            sentence = draw_sentence(sentences, text)
            pcm = np.frombuffer(espeak.speak(sentence), dtype="<i2").astype(np.float32) / np.float32(32768.0)
            speech = resample(torch.from_numpy(pcm)).numpy()
            duration = len(speech) / SAMPLING_RATE
            if not SHORTEST_SECONDS <= duration <= LONGEST_SECONDS:
                continue
            spawn_key = (speaker.identifier, utterances)
            noise = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=spawn_key))
            audio = finish_audio(
                speech,
                gain_decibels=speaker.gain_decibels,
                mains_hertz=speaker.mains_hertz if hum else None,
                generator=noise,
            )
            folder, name = _place(corpus, speaker, utterances)
            if folder not in lines:
                folder.mkdir(parents=True)
            _write_flac(folder / f"{name}.flac", audio)
            lines.setdefault(folder, []).append(f"{name} {transcript(sentence)}\n")
            utterances += 1
            seconds += duration
    for folder, transcripts in lines.items():
        write_text(folder / f"{speaker.identifier}-{folder.name}.trans.txt", "".join(transcripts))
    return SpeakerTotal(speaker, utterances, seconds)


def _place(corpus: Path, speaker: Speaker, utterance: int) -> tuple[Path, str]:
    """The folder and the name of utterance `utterance` of a speaker. Chapter numbers are unique in the corpus."""
    chapter_index, number = divmod(utterance, UTTERANCES_PER_CHAPTER)
    chapter = 1000 * speaker.identifier + chapter_index
    folder = corpus / speaker.part / str(speaker.identifier) / str(chapter)
    return folder, f"{speaker.identifier}-{chapter}-{number:04d}"


def _write_flac(path: Path, audio: NDArray[np.int16]) -> None:
    # Encode in memory: a full disk then raises an OSError that says so, not an error of the codec.
    encoded = io.BytesIO()
    soundfile.write(encoded, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    path.write_bytes(encoded.getbuffer())


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Resample with one thread per job: jobs do not compete, and the result does not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
