"""Compare a manifest with its audio files, by their headers or by decoding them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from w2vscale.config.tree import ModelConfig
from w2vscale.corpora.index import build_index
from w2vscale.corpora.parallel import Progress, WorkerDied, chunked, no_progress, parallel_map
from w2vscale.data.audio import AudioError, check_header, read_audio
from w2vscale.data.manifest import Manifest, audio_path
from w2vscale.data.micro_batch import BadAudio
from w2vscale.errors import UserError
from w2vscale.files import append_records, writing

SAMPLING_RATE = ModelConfig().sampling_rate
SHOWN = 20
"""Number of bad utterances that are kept in memory."""


@dataclass(frozen=True)
class Validation:
    """The number of utterances and of bad ones, and the first bad ones; the file `listing` has all of them."""

    utterances: int
    bad: int
    first: list[BadAudio]
    listing: Path


def listing_path(manifest: Path) -> Path:
    """The path of the list of bad utterances, one JSON object per line. The pattern cuts_*.jsonl does not match it."""
    return manifest.with_name(manifest.name + ".bad_audio")


def validate_manifest(
    path: Path, *, jobs: int = 4, audio: bool = False, progress: Progress = no_progress
) -> Validation:
    """Compare each utterance with the header of its file: existence, format, sampling rate, channels, duration.

    With `audio`, decode all utterances as training does, which also finds audio that is truncated, not finite or
    silent. Bad utterances are listed in the order of the manifest, followed by repeated ids. A missing or outdated
    index is built.

    Raises UserError if the manifest cannot be read, the list cannot be written, or a process died.
    """
    build_index(path, jobs=jobs)
    manifest = Manifest(path)
    listing = listing_path(path)
    with writing(listing):
        listing.unlink(missing_ok=True)
    count = 0
    first: list[BadAudio] = []

    def report(bad: Sequence[BadAudio]) -> None:
        nonlocal count
        count += len(bad)
        first.extend(bad[: SHOWN - len(first)])
        if bad:
            append_records(listing, map(asdict, bad))

    size = 16 if audio else 256
    chunks = list(chunked(range(len(manifest)), size))
    jobs = min(jobs, len(chunks))
    identifiers = np.empty(len(manifest), np.int64)
    is_bad = np.zeros(len(manifest), bool)
    done = 0
    try:
        # Isolated, because a file may crash the decoder.
        for found in parallel_map(partial(_check, manifest, audio), chunks, jobs=jobs, source=path, isolate=audio):
            for identifier, bad in found:
                identifiers[done], is_bad[done] = identifier, bad is not None
                done += 1
            report([bad for _, bad in found if bad is not None])
            progress(done, len(manifest))
    except WorkerDied as error:
        last = min(done + 2 * jobs * size, len(manifest)) - 1
        between = f"{_id_of(manifest, done)} and {_id_of(manifest, last)}"
        raise UserError(f"{error}; it was reading an utterance between {between}") from None
    report([bad for number, bad in _repeated(manifest, identifiers) if not is_bad[number]])
    return Validation(len(manifest), count, first, listing)


def _check(manifest: Manifest, audio: bool, numbers: Sequence[int]) -> list[tuple[int, BadAudio | None]]:
    """A hash of the id of each utterance, equal in all forked processes, and what is wrong with the utterance."""
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
                read_audio(cut, sampling_rate=SAMPLING_RATE)
            else:
                check_header(cut)
        except AudioError as error:
            bad = BadAudio.of(cut, error)
        found.append((hash(cut.id), bad))
    return found


def _repeated(manifest: Manifest, identifiers: NDArray[np.int64]) -> Iterator[tuple[int, BadAudio]]:
    """Utterances with the id of an earlier utterance."""
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
