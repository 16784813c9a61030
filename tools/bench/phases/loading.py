"""How much audio loader processes prepare, against what a GPU needs."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import soundfile
from lhotse import Recording

from tools.bench import loader as bench
from tools.bench.phases.measuring import Machine, Rows
from w2vscale.corpora.index import build_index
from w2vscale.corpora.manifests import write_cuts


def loader(machine: Machine) -> Rows:
    """Seconds of audio per second from one and from eight loader processes, and from as many bare decoding loops.

    Files of 15 s of quiet noise in FLAC, as `base` takes them: read, cropped, padded, with masks and negatives.
    """
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # where there are fewer cores
    files, seconds, micro_batches = (4, 2.0, 3) if machine.tiny else (64, 15.0, 80)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_noise(Path(folder), files, seconds)
        paths = sorted(str(path) for path in Path(folder).glob("*.flac"))
        settings = ["batch.max_seconds=20"] if machine.tiny else []
        for processes in (1, 2, 4, 8):
            if machine.tiny and processes > 1:
                yield f"processes_{processes}", None
                continue
            rate, copied = bench.load(manifest, processes, processes * micro_batches, settings)
            yield (
                f"processes_{processes}",
                {
                    "audio_seconds_per_second": rate,
                    "bare_decoding": bench.decode_in_processes(paths, processes),
                    "bytes_per_audio_second": copied,
                },
            )


def write_noise(folder: Path, files: int, seconds: float) -> Path:
    """An indexed manifest of FLAC files of quiet noise."""
    cuts = []
    for number in range(files):
        samples = 0.01 * np.random.default_rng(number).standard_normal(int(seconds * 16_000))
        path = folder / f"{number:03d}.flac"
        soundfile.write(path, samples, 16_000)
        cuts.append(Recording.from_file(path, recording_id=path.stem).to_cut())
    manifest = folder / "cuts.jsonl"
    write_cuts(cuts, manifest)
    build_index(manifest)
    return manifest
