"""A corpus whose transcripts are learned in seconds: every letter is a tone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lhotse import SupervisionSegment

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.micro import MICRO_ENCODER, MICRO_TRAINING

TONES = {"A": 300.0, "B": 700.0, "C": 1500.0, "D": 3100.0}
RATE = 16_000
SPELLED = ("data.max_seconds=4", "optim.weight_decay=0", "objective.mask_probability=0.1")
"""Settings of any objective on it."""
SPELLING = (
    *MICRO_ENCODER, *MICRO_TRAINING, "objective.name=ctc",
    "objective.vocabulary=['<pad>', '|', A, B, C, D]", *SPELLED,
)  # fmt: skip
"""Fine-tuning on it."""


def spoken(text: str, *, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A tenth of a second of tone for each letter, of silence for a space, and some noise."""
    seconds = np.arange(RATE // 10) / RATE
    parts = [np.sin(2 * np.pi * TONES.get(letter, 0.0) * seconds) * 0.3 for letter in text]
    audio = np.concatenate(parts).astype(np.float32)
    return audio + 0.05 * noise(audio.size / RATE, seed=seed)


def write_spelled(folder: Path, texts: list[str], *, speakers: int = 0) -> Path:
    """A manifest of utterances of these texts, by `speakers` speakers in turn."""
    cuts = []
    for number, text in enumerate(texts):
        cut = cut_of(write_audio(folder / f"u{number:02d}.flac", spoken(text or "ABCDABCD", seed=number)))
        spelled = SupervisionSegment(
            id=cut.id, recording_id=cut.recording_id, start=0.0, duration=cut.duration, text=text
        )
        spelled.speaker = f"speaker{number % speakers}" if speakers else None
        cut.supervisions = [spelled]
        cuts.append(cut)
    return write_manifest(folder / "cuts.jsonl", cuts)


def some_texts(count: int) -> list[str]:
    """Texts of 6 to 10 letters and a space. No letter follows itself, which would be one long tone."""
    random = np.random.default_rng(0)
    texts = []
    for _ in range(count):
        steps = random.integers(1, len(TONES), size=random.integers(6, 11))
        letters = "".join(list(TONES)[place] for place in np.cumsum(steps) % len(TONES))
        texts.append(f"{letters[:3]} {letters[3:]}")
    return texts
