"""Select a subset of a manifest, for example for fine-tuning with little transcribed speech."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from w2vscale.corpora.manifests import PreparedManifest
from w2vscale.data.manifest import Manifest
from w2vscale.data.randomness import Stream, generator
from w2vscale.errors import UserError
from w2vscale.files import new_file


@dataclass(frozen=True)
class _Utterance:
    number: int  # in the manifest
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
    """Write a subset of an indexed manifest to `output`, in the order of the manifest.

    Args:
        manifest: An indexed manifest.
        output: The new manifest.
        hours: Size of the subset, sampled with `seed`. For one seed, a larger subset contains the smaller ones.
        balanced: Give all speakers about the same duration, instead of sampling all utterances uniformly.
        identifiers: A file with one utterance id per line, to select from these utterances only.
        seed: Seed for sampling.

    Raises:
        UserError: the manifest has fewer hours or lacks one of the utterances; a file cannot be read or written.
    """
    Manifest(manifest)  # check that it is complete and unchanged
    # Not splitlines: a transcript may contain other Unicode line separators.
    lines = [f"{line}\n" for line in manifest.read_text(encoding="utf-8").split("\n") if line.strip()]
    utterances = [_parse(number, line) for number, line in enumerate(lines)]
    if identifiers is not None:
        utterances = _listed(utterances, identifiers, manifest)
    if hours is not None:
        utterances = _sampled(utterances, hours, balanced=balanced, seed=seed, manifest=manifest)
    with new_file(output) as file:
        file.writelines(lines[number] for number in sorted(utterance.number for utterance in utterances))
    return PreparedManifest(output, len(utterances), sum(utterance.seconds for utterance in utterances) / 3600)


def _parse(number: int, line: str) -> _Utterance:
    cut = json.loads(line)
    supervisions = cut.get("supervisions") or [{}]
    return _Utterance(number, str(cut["id"]), str(supervisions[0].get("speaker")), float(cut["duration"]))


def _listed(utterances: list[_Utterance], identifiers: Path, manifest: Path) -> list[_Utterance]:
    try:
        wanted = set(identifiers.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{identifiers}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if absent := wanted - {utterance.identifier for utterance in utterances}:
        others = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(f"{identifiers}: utterance {min(absent)}{others} is not in {manifest}")
    return [utterance for utterance in utterances if utterance.identifier in wanted]


def _sampled(
    utterances: list[_Utterance], hours: float, *, balanced: bool, seed: int, manifest: Path
) -> list[_Utterance]:
    shuffled = [utterances[place] for place in generator(seed, Stream.SUBSET).permutation(len(utterances))]
    sampled: list[_Utterance] = []
    seconds = 0.0
    for utterance in _by_speaker_in_turn(shuffled) if balanced else shuffled:
        if seconds >= 3600 * hours:
            break
        sampled.append(utterance)
        seconds += utterance.seconds
    if seconds < 3600 * hours:
        raise UserError(f"{manifest}: has {seconds / 3600:.2f} hours, fewer than --hours {hours:g}")
    return sampled


def _by_speaker_in_turn(utterances: list[_Utterance]) -> Iterator[_Utterance]:
    """All utterances; the next one is always from the speaker with the least duration so far."""
    of_speaker: dict[str, list[_Utterance]] = {}
    for utterance in reversed(utterances):
        of_speaker.setdefault(utterance.speaker, []).append(utterance)
    queue = [(0.0, number, remaining) for number, remaining in enumerate(of_speaker.values())]
    while queue:
        seconds, number, remaining = heapq.heappop(queue)
        utterance = remaining.pop()
        yield utterance
        if remaining:
            heapq.heappush(queue, (seconds + utterance.seconds, number, remaining))
