"""Folders of runs with any settings, metrics and events, without training."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.helpers.audio import noise, write_audio
from w2vscale.config import dump_config
from w2vscale.evaluation.wer import score, summarise
from w2vscale.objectives import load

START = {
    "event": "start", "time": "2026-11-29T20:07:02+00:00", "update": 0, "host": "node-17", "devices": "8 NVIDIA H100",
    "processes": 8, "engine": "fsdp", "objective": "wav2vec2", "parameters": 95_044_608,
    "trained_parameters": 95_000_000,
    "training": {"hours": 960.9, "utterances": 281_241, "padding": 0.031}, "validation": "10.3 hours, 5,567 utterances",
    "updates": 1000, "epochs": 2.5, "w2vscale": "0.1.0", "torch": "2.13.0", "cuda": "13.0",
}  # fmt: skip
SPIKE = {"event": "health", "time": "2026-11-29T21:00:00Z", "update": 40, "kind": "spike", "text": "the loss spikes"}
BACK = {
    "event": "roll_back", "time": "2026-11-29T21:01:00Z", "update": 30, "left_at": 50,
    "text": "going back to update 30",
}  # fmt: skip


def write_run(
    exp: Path,
    preset: str = "tiny",
    *settings: str,
    updates: int = 100,
    every: int = 10,
    events: Sequence[dict[str, Any]] = (),
    roll_backs: Sequence[int] = (),
) -> Path:
    """Write a run folder with a log line every `every` updates, and a validation on all sets at every fifth of them."""
    (exp / "logs").mkdir(parents=True)
    config, objective = load(preset, settings)
    (exp / "config.yaml").write_text(dump_config(config))
    (exp / "run.sh").write_text(f"#!/usr/bin/env bash\nw2vscale train {preset}\n")
    keys = [key for panel in objective.panels() for key in panel.keys]
    lines = []
    for number in range(1, updates // every + 1):
        update = number * every
        curve = 1.0 / (1.0 + number) + 0.05 * math.sin(number)
        values = {"hours_seen": update / 90, **{key: 2.0 * curve + place for place, key in enumerate(keys)}}
        common = {
            "loss": curve,
            "grad_norm": 10 * curve + 1,
            "lr": 1e-3,
            "audio_seconds_per_second": 50.0,
            "padding": 0.1,
        }
        lines.append({"split": "train", "update": update, **values, **common})
        if number % 5 == 0:
            lines.append({"split": "validation", "update": update, **values})
            for place, name in enumerate(config.data.validation_sets, 1):
                higher = {key: value + place for key, value in values.items() if key != "hours_seen"}
                lines.append({"split": f"validation_{name}", "update": update, **values, **higher})
    lines += [{"split": "roll_back", "update": at, "left_at": at + 20, "skipped_windows": 20} for at in roll_backs]
    (exp / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if events:
        (exp / "logs" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return exp


def write_samples(exp: Path, update: int, name: str = "spectrogram") -> Path:
    """A picture and a sound of an update."""
    folder = exp / "samples" / f"update_{update:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(png(64, 24))
    write_audio(folder / f"{name}.flac", noise(0.2, seed=update))
    return folder


def write_utterance(exp: Path, update: int, number: int, text: str) -> None:
    """The picture, the sound and the text of an utterance, as a run saves them."""
    folder = write_samples(exp, update, f"{number}_spectrogram")
    (folder / f"{number}_spectrogram.flac").rename(folder / f"{number}_audio.flac")
    (folder / f"{number}_text.txt").write_text(text)


def png(width: int, height: int) -> bytes:
    """A grey picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + bytes((x * y) % 256 for x in range(width)) for y in range(height))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_error_rates(path: Path, texts: Sequence[tuple[str, str]], *, speaker: str = "ann") -> None:
    """What `evaluate --wer --output` writes about pairs of reference and hypothesis."""
    found = summarise([score(f"u{n}", *pair, speaker=speaker) for n, pair in enumerate(texts)], [])
    rates = {"wer": found.words.rate, "cer": found.characters.rate}
    document = {"checkpoint": "exp", "cuts": ["test-clean"], "decoding": "greedy", **rates, **asdict(found)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
