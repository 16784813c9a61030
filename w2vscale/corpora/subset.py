"""A part of a manifest, for experiments with few transcripts."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from w2vscale.corpora.prepare import PreparedManifest, whole_file
from w2vscale.data.manifest import Manifest
from w2vscale.data.randomness import Stream, generator
from w2vscale.errors import UserError


@dataclass(frozen=True)
class _Utterance:
    place: int  # in the manifest
    identifier: str
    speaker: str
    seconds: float


def write_subset(
    manifest: Path,
    output: Path,
    *,
    hours: float | None = None,
    balanced: bool = False,
    identifiers: Path | None = None,
    seed: int = 0,
) -> PreparedManifest:
    """Write utterances of an indexed manifest to `output`, in its order.

    `identifiers`: a file with one utterance a line; all of them are taken, or `hours` of them. `hours` are drawn from
    `seed`, all utterances alike or, if `balanced`, so that speakers get about equal time; a larger subset of the same
    seed contains the smaller.

    Raises:
        UserError: the manifest has fewer hours, or lacks an utterance that is asked for; a file cannot be read or
            written.
    """
    Manifest(manifest)  # it is whole and unchanged
    # Not splitlines: a transcript may hold what Unicode counts as the end of a line.
    lines = [f"{line}\n" for line in manifest.read_text(encoding="utf-8").split("\n") if line.strip()]
    utterances = [_read(place, line) for place, line in enumerate(lines)]
    if identifiers is not None:
        utterances = _named(utterances, identifiers, manifest)
    if hours is not None:
        utterances = _drawn(utterances, hours, balanced=balanced, seed=seed, manifest=manifest)
    with whole_file(output) as file:
        file.writelines(lines[place] for place in sorted(utterance.place for utterance in utterances))
    return PreparedManifest(output, len(utterances), sum(utterance.seconds for utterance in utterances) / 3600)


def _read(place: int, line: str) -> _Utterance:
    cut = json.loads(line)
    said = cut.get("supervisions") or [{}]
    return _Utterance(place, str(cut["id"]), str(said[0].get("speaker")), float(cut["duration"]))


def _named(utterances: list[_Utterance], identifiers: Path, manifest: Path) -> list[_Utterance]:
    try:
        wanted = set(identifiers.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{identifiers}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if absent := wanted - {utterance.identifier for utterance in utterances}:
        raise UserError(f"{identifiers}: {min(absent)} is not in {manifest} ({len(absent)} are not)")
    return [utterance for utterance in utterances if utterance.identifier in wanted]


def _drawn(
    utterances: list[_Utterance], hours: float, *, balanced: bool, seed: int, manifest: Path
) -> list[_Utterance]:
    shuffled = [utterances[place] for place in generator(seed, Stream.SUBSET).permutation(len(utterances))]
    drawn: list[_Utterance] = []
    seconds = 0.0
    for utterance in _in_turn(shuffled) if balanced else shuffled:
        if seconds >= 3600 * hours:
            break
        drawn.append(utterance)
        seconds += utterance.seconds
    if seconds < 3600 * hours:
        raise UserError(f"{manifest}: has {seconds / 3600:.2f} hours, fewer than --hours {hours:g}")
    return drawn


def _in_turn(utterances: list[_Utterance]) -> Iterator[_Utterance]:
    """Each utterance is of the speaker who has had least time."""
    of_speaker: dict[str, list[_Utterance]] = {}
    for utterance in reversed(utterances):
        of_speaker.setdefault(utterance.speaker, []).append(utterance)
    turns = [(0.0, number, left) for number, left in enumerate(of_speaker.values())]
    while turns:
        had, number, left = heapq.heappop(turns)
        utterance = left.pop()
        yield utterance
        if left:
            heapq.heappush(turns, (had + utterance.seconds, number, left))
