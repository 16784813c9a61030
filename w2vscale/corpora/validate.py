"""Compare a manifest with its audio files, by their headers or by decoding them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from w2vscale.config.tree import ModelConfig
from w2vscale.corpora.index import index_lines
from w2vscale.corpora.parallel import WHOLE, Part, Progress, WorkerDied, chunked, no_progress, parallel_map
from w2vscale.data.audio import AudioError, check_header, read_audio
from w2vscale.data.cuts import FILES, NotACut
from w2vscale.data.manifest import Manifest, audio_path, local_manifest, naming
from w2vscale.data.micro_batch import BadAudio
from w2vscale.errors import UserError
from w2vscale.files import append_records, writing
from w2vscale.storage.urls import Url

SAMPLING_RATE = ModelConfig().sampling_rate
SHOWN = 20  # bad utterances that are kept in memory


@dataclass(frozen=True)
class Validation:
    """The number of checked utterances and of bad ones, and the first bad ones; the file `listing` has all of them."""

    utterances: int
    bad: int
    first: list[BadAudio]
    listing: Path


def listing_path(manifest: Path | Url, *, audio: bool, part: Part = WHOLE) -> Path:
    """The path of the list of bad utterances, one JSON object per line. The pattern cuts_*.jsonl does not match it.

    It is beside the manifest; that of a manifest at a URL is in the current folder. Comparing headers, which is quick,
    does not replace the list from decoding all `audio`. Each `part` has its own.
    """
    suffix = f".{part.number}-of-{part.count}" if part.count > 1 else ""
    folder = Path() if isinstance(manifest, Url) else manifest.parent
    return folder / (manifest.name + (".bad_audio" if audio else ".bad_headers") + suffix)


def validate_manifest(
    path: Path | Url,
    *,
    jobs: int = 4,
    audio: bool = False,
    part: Part = WHOLE,
    progress: Progress = no_progress,
    schemes: Collection[str] = FILES,
) -> Validation:
    """Compare each utterance with the header of its file: existence, format, sampling rate, channels, duration.

    With `audio`, decode all utterances as training does, which also finds audio that is truncated, not finite or
    silent. Bad utterances are listed in the order of the manifest, followed by repeated ids. A line that is not a cut
    is a bad utterance. A missing or outdated index is built if there is none.

    With `part`, only its utterances are checked, and the lists of all parts have what the list of the whole has.

    `schemes`: the setting `data.url_schemes`. Raises UserError if the manifest cannot be read or has audio elsewhere,
    the list cannot be written, or a process died.
    """
    local = local_manifest(path)
    with naming(local, path):
        index = index_lines(local, jobs=jobs, keep_unusable=True, schemes=schemes)
    manifest = Manifest(path, index, schemes=schemes)
    listing = listing_path(path, audio=audio, part=part)
    with writing(listing):
        listing.unlink(missing_ok=True)
    first: list[BadAudio] = []
    bad_numbers: set[int] = set()

    def report(found: dict[int, BadAudio]) -> None:
        new = [bad for number, bad in found.items() if number not in bad_numbers]
        bad_numbers.update(found)
        first.extend(new[: SHOWN - len(first)])
        if new:
            append_records(listing, map(asdict, new))

    size = 16 if audio else 256
    numbers = part.range(len(manifest))
    # An utterance repeats an earlier one, so the ids of earlier parts are needed, too.
    chunks = [*chunked(range(numbers.start), 4096), *chunked(numbers, size)]
    jobs = max(min(jobs, len(chunks)), 1)
    hashes = np.empty(numbers.stop, np.int64)
    done = 0
    try:
        # Isolated, because a file may crash the decoder.
        check = partial(_check, manifest, audio, numbers.start)
        found = parallel_map(check, chunks, jobs=jobs, source=path, isolate=audio)
        for checked, bad in found:
            hashes[done : done + len(checked)] = checked
            done += len(checked)
            report(bad)
            progress(done, numbers.stop)
    except WorkerDied as error:
        last = min(done + 2 * jobs * size, numbers.stop) - 1
        one, other = (_name(manifest, number) for number in (done, last))
        raise UserError(f"{error}; it was reading an utterance between {one} and {other}") from None
    repeated = _repeated(manifest, hashes)
    report({number: bad for number, bad in repeated.items() if number in numbers})
    return Validation(len(numbers), len(bad_numbers), first, listing)


def _name(manifest: Manifest, number: int) -> str:
    try:
        return manifest.cut(number).id
    except NotACut:
        return f"number {number + 1}"


def _check(
    manifest: Manifest, audio: bool, start: int, numbers: Sequence[int]
) -> tuple[list[int], dict[int, BadAudio]]:
    """A hash of the id of each utterance, equal in all forked processes, and what is wrong with the bad ones.

    Utterances before `start` are not checked.
    """
    if audio:
        torch.set_num_threads(1)
    hashes: list[int] = []
    bad: dict[int, BadAudio] = {}
    for number in numbers:
        try:
            cut = manifest.cut(number)
        except NotACut as error:
            hashes.append(hash((number,)))
            if number >= start:
                bad[number] = BadAudio.of_line(number, error)
            continue
        hashes.append(hash(cut.id))
        if number < start:
            continue
        try:
            if audio:
                read_audio(cut, sampling_rate=SAMPLING_RATE)
            else:
                check_header(cut)
        except AudioError as error:
            bad[number] = BadAudio.of(cut, error)
    return hashes, bad


def _repeated(manifest: Manifest, hashes: NDArray[np.int64]) -> dict[int, BadAudio]:
    """Utterances with the id of an earlier utterance."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    found = {}
    for number, earlier in sorted(zip(order[same + 1].tolist(), order[same].tolist(), strict=True)):
        cut = manifest.cut(number)
        if cut.id == manifest.cut(earlier).id:
            found[number] = BadAudio(cut.id, audio_path(cut), "repeated", f"the id {cut.id} occurs twice")
    return found
