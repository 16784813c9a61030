"""Select a subset of a manifest, for example for fine-tuning with little transcribed speech."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w2vscale.corpora.manifests import PreparedManifest
from w2vscale.corpora.text_files import lines_of_file
from w2vscale.data.manifest import Manifest
from w2vscale.data.randomness import Stream, generator
from w2vscale.errors import UserError
from w2vscale.files import new_file


def write_subset(
    path: Path,
    output: Path,
    *,
    hours: float | None = None,
    balanced: bool = False,
    identifiers: Path | None = None,
    seed: int = 0,
) -> PreparedManifest:
    """Write a subset of an indexed manifest to `output`, in the order of the manifest.

    `identifiers` is a file with one utterance id per line, to select from these utterances only. `hours` are sampled
    with `seed`: uniformly, or, if `balanced`, with about the same duration for all speakers. For one seed, a larger
    subset contains the smaller ones.

    Raises UserError if the manifest has fewer hours or lacks an utterance, a line is not a cut, audio is not in files,
    or a file cannot be read or written.
    """
    manifest = Manifest(path)
    numbers = np.arange(len(manifest)) if identifiers is None else _listed(manifest, identifiers)
    if hours is not None:
        numbers = numbers[generator(seed, Stream.SUBSET).permutation(numbers.size)]
        if balanced:
            numbers = _by_speaker_in_turn(manifest, numbers)
        seconds = np.cumsum([0.0, *manifest.durations[numbers]])
        if seconds[-1] < 3600 * hours:
            raise UserError(f"{path}: has {seconds[-1] / 3600:.2f} hours, fewer than --hours {hours:g}")
        numbers = np.sort(numbers[: np.searchsorted(seconds, 3600 * hours)])
    if not numbers.size:
        raise UserError(f"{path}: no utterance is selected; choose more hours or ids")
    with new_file(output, "wb") as file:
        for number in numbers:
            manifest.cut(number)  # a line that is not a cut of files is refused
            file.write(manifest.line(number).strip() + b"\n")
    return PreparedManifest(output, numbers.size, float(manifest.durations[numbers].sum()) / 3600)


def _listed(manifest: Manifest, identifiers: Path) -> NDArray[np.int64]:
    ids = [manifest.read(number, lambda cut: str(cut["id"])) for number in range(len(manifest))]
    wanted = set(lines_of_file(identifiers)) - {""}
    if absent := wanted - {identifier.strip() for identifier in ids}:
        others = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(f"{identifiers}: utterance {min(absent)}{others} is not in {manifest.path}")
    return np.flatnonzero([identifier.strip() in wanted for identifier in ids])


def _by_speaker_in_turn(manifest: Manifest, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Reorder utterances so that the next one is always from the speaker with the least duration so far."""
    so_far: dict[str, float] = defaultdict(float)
    starts = []
    for number in numbers:
        speaker = manifest.read(number, _speaker_of)
        starts.append(so_far[speaker])
        so_far[speaker] += manifest.durations[number]
    return numbers[np.argsort(starts, kind="stable")]


def _speaker_of(cut: dict[str, Any]) -> str:
    supervisions = cut.get("supervisions") or [{}]
    return str(supervisions[0].get("speaker"))
