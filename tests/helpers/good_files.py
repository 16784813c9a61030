"""Good files of every kind, of which fuzz tests make damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import soundfile

from tests.helpers.audio import FORMATS, cut_of, noise, write_manifest
from tests.helpers.faults import run
from tests.helpers.micro import MICRO_ENCODER, MICRO_MODEL, MICRO_TRAINING
from tests.helpers.odd_input import (
    as_lines,
)
from w2vscale.config import dump_config, load_config
from w2vscale.corpora.index import build_index
from w2vscale.corpora.shar import write_shards
from w2vscale.data.vocabulary import LETTERS
from w2vscale.training.train import train

AUDIO_FORMATS = {**FORMATS, ".sph": ("NIST", "PCM_16")}
TEXTS = ("HELLO WORLD AND ALL", "THE QUICK BROWN FOX", "JUMPS OVER THE LAZY DOG")
ARPA = r"""\data\
ngram 1=5
ngram 2=2

\1-grams:
-1.0 <unk>
-99 <s> -0.3
-1.0 </s>
-0.7 HELLO -0.3
-0.7 WORLD -0.3

\2-grams:
-0.3 <s> HELLO
-0.3 HELLO WORLD

\end\
"""
VALUES = {"hours_seen": 0.1, "loss": 1.5, "accuracy": 0.3, "grad_norm": 2.0, "code_perplexity": 9.0}
METRICS = [{"split": split, "update": update, **VALUES} for update in (1, 2) for split in ("train", "validation")]
COUNTS = {"reference": 5, "substitutions": 1, "deletions": 0, "insertions": 0}
RESULTS = {
    "wer": 0.2,
    "cer": 0.1,
    "word_interval": [0.1, 0.3],
    "character_interval": [0.0, 0.2],
    "cuts": ["a"],
    "decoding": "greedy",
    "utterances": [{"utterance": "u", "words": COUNTS, "characters": COUNTS}],
}
MICRO_CTC = (*MICRO_ENCODER, "objective.freeze_encoder_updates=0", "regularization.feature_grad_mult=1")


class Good(NamedTuple):
    """A folder of good files."""

    folder: Path

    def bytes(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def cuts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.bytes("cuts.jsonl").splitlines()]


def write_good(folder: Path) -> Good:
    """Write audio in all formats, manifests, shards, models for text, metrics, and runs of both objectives."""
    import matplotlib.font_manager  # noqa: F401 - its first import on a machine starts a program that lists the fonts

    cuts = []
    for number, (suffix, (kind, subtype)) in enumerate(AUDIO_FORMATS.items()):
        path = folder / f"u{number}{suffix}"
        soundfile.write(path, noise(1.0, seed=number), 16_000, format=kind, subtype=subtype)
        if suffix != ".sph":
            cuts.append(cut_of(path))
    write_manifest(folder / "cuts.jsonl", cuts)
    texts = [_with_text(cut.to_dict(), text, f"{cut.id}-{n}") for cut in cuts for n, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_bytes(as_lines(*texts))
    build_index(folder / "texts.jsonl")
    write_shards(folder / "cuts.jsonl", folder / "shards", shard_size=3)
    settings = ["data.min_seconds=0.3", "batch.max_seconds=20"]
    (folder / "config.yaml").write_text(dump_config(load_config("tiny", settings)))
    (folder / "letters.txt").write_text("\n".join(LETTERS))
    (folder / "words.txt").write_text("HELLO\nWORLD W O R L D |\n")
    (folder / "lm.arpa").write_text(ARPA)
    (folder / "metrics.jsonl").write_bytes(as_lines(*METRICS))
    (folder / "results.json").write_bytes(as_lines(RESULTS))
    run("data", "pieces", folder / "texts.jsonl", "-o", folder / "pieces.model", "--size", 30)
    for name, preset, more in (("exp", "base", MICRO_MODEL), ("ctc", "ctc_1h", MICRO_CTC)):
        settings = [*MICRO_TRAINING, *more, f"data.train={folder / 'texts.jsonl'}", "data.min_seconds=0.3"]
        train(load_config(preset, [*settings, "trainer.updates=5"]), folder / name)
    return Good(folder)


def _with_text(cut: dict[str, Any], text: str, identifier: str) -> dict[str, Any]:
    segment = {"id": "s", "recording_id": cut["id"], "start": 0.0, "duration": 1.0, "channel": 0}
    return cut | {"id": identifier, "supervisions": [{**segment, "text": text, "speaker": "a"}]}
