"""Does a manifest agree with its audio files? By their headers, or by decoding them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from w2vscale.config.tree import ModelConfig
from w2vscale.corpora.index import build_index
from w2vscale.corpora.journal import writing
from w2vscale.corpora.parallel import WorkerDied, parallel_map
from w2vscale.data.audio import AudioError, check_header, read_audio
from w2vscale.data.manifest import Manifest, audio_path
from w2vscale.data.micro_batch import BadAudio
from w2vscale.errors import UserError

SAMPLING_RATE = ModelConfig().sampling_rate
SHOWN = 20
"""Bad utterances that are kept in memory."""


@dataclass(frozen=True)
class Validation:
    """What was found in a manifest: how many utterances are bad, and the first of them; all are in `listing`."""

    utterances: int
    bad: int
    first: list[BadAudio]
    listing: Path


def listing_path(manifest: Path) -> Path:
    """Where the bad utterances of a manifest are listed, a JSON object a line; not a name that cuts_*.jsonl means."""
    return manifest.with_name(manifest.name + ".bad_audio")


def validate_manifest(
    path: Path, *, jobs: int = 4, audio: bool = False, progress: Callable[[int, int], None] | None = None
) -> Validation:
    """Compare each utterance with its file's header: existence, format, sampling rate, channels, duration.

    With `audio`, utterances are decoded as training does, which finds also what is cut short, not finite or silent.
    Bad ones are listed in the manifest's order as they are found, and ids that occur again after those. An index is
    made where it is missing or of another version of the manifest.

    Raises:
        UserError: the manifest cannot be read, the list not be written, or a process died.
    """
    build_index(path, jobs=jobs)
    manifest = Manifest(path)
    listing = listing_path(path)
    with writing(listing):
        if listing.exists():
            listing.unlink()
    count = 0
    first: list[BadAudio] = []

    def report(bad: Sequence[BadAudio]) -> None:
        nonlocal count
        count += len(bad)
        first.extend(bad[: SHOWN - len(first)])
        if bad:
            with writing(listing), listing.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(asdict(one)) + "\n" for one in bad)

    size = 16 if audio else 256
    chunks = [range(start, min(start + size, len(manifest))) for start in range(0, len(manifest), size)]
    jobs = min(jobs, len(chunks))
    identifiers = np.empty(len(manifest), np.int64)
    is_bad = np.zeros(len(manifest), bool)
    done = 0
    try:
        # Isolated, since a file may crash its decoder.
        for found in parallel_map(partial(_check, manifest, audio), chunks, jobs=jobs, source=path, isolate=audio):
            for identifier, bad in found:
                identifiers[done], is_bad[done] = identifier, bad is not None
                done += 1
            report([bad for _, bad in found if bad is not None])
            if progress is not None:
                progress(done, len(manifest))
    except WorkerDied as error:
        last = min(done + 2 * jobs * size, len(manifest)) - 1
        raise UserError(f"{error}; while it read one of {_id_of(manifest, done)} to {_id_of(manifest, last)}") from None
    report([bad for number, bad in _repeated(manifest, identifiers) if not is_bad[number]])
    return Validation(len(manifest), count, first, listing)


def _check(manifest: Manifest, audio: bool, numbers: range) -> list[tuple[int, BadAudio | None]]:
    """Of each utterance a hash of its id, which is the same in forked processes, and what is wrong with it."""
    if audio:
        torch.set_num_threads(1)
    found: list[tuple[int, BadAudio | None]] = []
    for number in numbers:
        try:
            cut = manifest.cut(number)
        except UserError as error:
            found.append((hash((number,)), BadAudio(f"number {number}", str(manifest.path), "mismatched", str(error))))
            continue
        bad = None
        try:
            if audio:
                whole = round(cut.duration * SAMPLING_RATE)
                read_audio(cut, sampling_rate=SAMPLING_RATE, offset=0, length=whole, normalize=False)
            else:
                check_header(cut)
        except AudioError as error:
            bad = BadAudio(cut.id, audio_path(cut), error.kind, str(error))
        found.append((hash(cut.id), bad))
    return found


def _repeated(manifest: Manifest, identifiers: NDArray[np.int64]) -> Iterator[tuple[int, BadAudio]]:
    """Utterances whose id an earlier one has."""
    order = np.argsort(identifiers, kind="stable")
    same = np.flatnonzero(identifiers[order[1:]] == identifiers[order[:-1]])
    for number, earlier in sorted(zip(order[same + 1].tolist(), order[same].tolist(), strict=True)):
        cut = manifest.cut(number)
        if cut.id == manifest.cut(earlier).id:
            yield number, BadAudio(cut.id, audio_path(cut), "repeated", f"the id {cut.id} occurs twice")


def _id_of(manifest: Manifest, number: int) -> str:
    try:
        return str(manifest.cut(number).id)
    except UserError:
        return f"number {number}"
