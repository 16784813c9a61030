"""Make a small corpus of synthetic English speech in LibriSpeech's layout: same arguments, same bytes.

Which speakers there are and what they say are pure functions of the arguments; espeak-ng speaks in one
process per speaker (see `espeak.py`), and threads drive those processes.
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

from w2vscale.data.espeak import EspeakProcess, Voice, locate_espeak
from w2vscale.data.sentences import Text, draw_sentence, transcript
from w2vscale.errors import UserError

SAMPLING_RATE = 16_000
SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 15.0
UTTERANCES_PER_CHAPTER = 40
FIRST_SPEAKER = 1001
RECIPE = 1  # raise it when the same arguments begin to give other audio
STAMP = "synthesis.json"

ACCENTS = (
    "en-us",
    "en",  # en-gb: espeak-ng gives variants to a voice by its file's name
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
    """One speaker of one part: a voice, a loudness and how much speech it gives."""

    identifier: int
    part: str
    sex: str  # F or M
    voice: Voice
    gain_decibels: float
    mains_hertz: float
    seconds: float  # at least; the last utterance may pass it


@dataclass(frozen=True)
class SpeakerTotal:
    """What one speaker gave."""

    speaker: Speaker
    utterances: int
    seconds: float


@dataclass(frozen=True)
class SynthesisSummary:
    """What a corpus holds, and whether this call made it or found it complete."""

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
    """Write a corpus in LibriSpeech's layout, 16 kHz, 16 bit, mono, with transcripts and SPEAKERS.TXT.

    The files are `output/LibriSpeech/PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac`. `parts` maps the name
    of a part to its minutes of speech: at least these, and less than one utterance more per speaker. No
    speaker is in two parts; `speakers_per_part` defaults to one per minute, from 4 to 64. The files depend
    on all arguments but `jobs`, the number of speakers at work at once. `progress` is called in this thread
    with the numbers of finished and of all speakers.

    A complete corpus of the same arguments is left as it is. A corpus appears under its name only when it is
    complete. With `hum`, that of the mains lies under all speech.

    Raises:
        UserError: arguments out of range, a folder that holds something else or cannot be written, no espeak-ng.
    """
    speakers = draw_speakers(parts, speakers_per_part=speakers_per_part, seed=seed)
    if jobs < 1:
        raise UserError(f"jobs is {jobs}; it must be at least 1")
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
    try:
        found = _find_corpus(output, corpus, unfinished, arguments)
        if found is not None:
            return found
        locate_espeak()
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            totals = _synthesise_speakers(
                speakers, unfinished, text=text, hum=hum, seed=seed, jobs=jobs, progress=progress
            )
            (unfinished / "SPEAKERS.TXT").write_text(speakers_table(totals), encoding="utf-8")
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
    except OSError as error:
        raise UserError(
            f"cannot write the synthetic corpus to {output}: {error.strerror or error}; "
            "choose a folder that you can write to"
        ) from error
    return summary


def draw_speakers(parts: Mapping[str, float], *, speakers_per_part: int | None = None, seed: int = 0) -> list[Speaker]:
    """The speakers of all parts: a pure function, the same for any order of `parts`.

    Voices are drawn without replacement: the first 96 speakers all have different ones. Raises UserError for
    arguments out of range.
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
    """Speech in [-1, 1] with noise and hum (if any) 25 to 35 dB below it, scaled by the gain, as 16-bit samples."""
    loudness = math.sqrt(float(np.mean(np.square(speech))))
    hum = mains_hum(len(speech), mains_hertz, generator) if mains_hertz is not None else 0.0
    background = hum + 0.3 * room_noise(len(speech), generator)
    level = loudness * 10.0 ** (-generator.uniform(25.0, 35.0) / 20.0)
    scaled = (speech + level * background) * (32767.0 * 10.0 ** (gain_decibels / 20.0))
    return np.clip(np.rint(scaled), -32768, 32767).astype(np.int16)


def mains_hum(samples: int, hertz: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """Hum of about unit power at the mains' frequency and its overtones, as amateur recordings have it."""
    harmonics = np.arange(1, 6)
    phases = 2.0 * np.pi * (np.outer(harmonics, np.arange(samples) * hertz / SAMPLING_RATE) + generator.random((5, 1)))
    return np.sqrt(2.0) * (np.sin(phases) / harmonics[:, None]).sum(axis=0) / math.sqrt(sum(1.0 / harmonics**2))


def room_noise(samples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Noise of unit power that falls by 6 dB an octave above 40 Hz, as that of rooms does."""
    spectrum = np.fft.rfft(generator.standard_normal(samples))
    hertz = np.arange(spectrum.size) * (SAMPLING_RATE / samples)
    noise = np.fft.irfft(spectrum / np.maximum(hertz, 40.0), samples)
    return noise / noise.std()


def _check_arguments(parts: Mapping[str, float], speakers_per_part: int | None, seed: int) -> None:
    if not parts:
        raise UserError("no part to synthesise; name at least one, as in train-clean-5 with 12 minutes")
    for part, minutes in parts.items():
        if not re.fullmatch(r"\w[\w.-]*", part, flags=re.ASCII):
            raise UserError(
                f"part '{part}' cannot name a folder; use letters, digits, '-', '_', '.', as in train-clean-5"
            )
        if not (math.isfinite(minutes) and minutes > 0):
            raise UserError(f"part '{part}' has {minutes:g} minutes of speech; it must be more than 0")
    if speakers_per_part is not None and speakers_per_part < 1:
        raise UserError(f"speakers per part is {speakers_per_part}; it must be at least 1")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must be 0 or more")


def _find_corpus(output: Path, corpus: Path, unfinished: Path, arguments: Mapping[str, Any]) -> SynthesisSummary | None:
    """The corpus of these arguments if it is there, None if `output` is free for one, else UserError."""
    if not output.exists() or all(entry == unfinished for entry in output.iterdir()):
        return None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, KeyError, json.JSONDecodeError):
        stamp = json.loads((corpus / STAMP).read_text(encoding="utf-8"))
        files = sum(1 for _ in corpus.rglob("*.flac"))
        if stamp["arguments"] == arguments and stamp["utterances"] == files:
            return SynthesisSummary(corpus, stamp["speakers"], files, stamp["seconds"], created=False)
    raise UserError(
        f"{output} is not empty and does not hold the complete synthetic corpus of these arguments; "
        "choose another folder or delete it"
    )


def _write_stamp(corpus: Path, arguments: Mapping[str, Any], summary: SynthesisSummary) -> None:
    stamp = {
        "arguments": arguments,
        "speakers": summary.speakers,
        "utterances": summary.utterances,
        "seconds": summary.seconds,
    }
    (corpus / STAMP).write_text(json.dumps(stamp, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    """Speak sentences until the speaker's seconds are reached or `stop` is set, and write its files."""
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
        table = folder / f"{speaker.identifier}-{folder.name}.trans.txt"
        table.write_text("".join(transcripts), encoding="utf-8")
    return SpeakerTotal(speaker, utterances, seconds)


def _place(corpus: Path, speaker: Speaker, utterance: int) -> tuple[Path, str]:
    """The folder and the name of a speaker's n-th utterance. Chapter numbers are unique over the corpus."""
    chapter_index, number = divmod(utterance, UTTERANCES_PER_CHAPTER)
    chapter = 1000 * speaker.identifier + chapter_index
    folder = corpus / speaker.part / str(speaker.identifier) / str(chapter)
    return folder, f"{speaker.identifier}-{chapter}-{number:04d}"


def _write_flac(path: Path, audio: NDArray[np.int16]) -> None:
    # Encoded in memory: a full disk is then an OSError that says so, not a codec's error.
    encoded = io.BytesIO()
    soundfile.write(encoded, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    path.write_bytes(encoded.getbuffer())


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Resample with one thread per job: jobs do not compete, and sums do not depend on the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
