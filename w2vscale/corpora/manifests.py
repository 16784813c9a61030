"""Write Lhotse cut manifests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from w2vscale.files import new_file


@dataclass(frozen=True)
class PreparedManifest:
    """A manifest that was written. The numbers of audio files are those of the whole folder."""

    path: Path
    utterances: int
    hours: float
    unreadable: int = 0
    """Audio files that were left out because they are unreadable."""
    read: int = 0
    """Audio files whose headers were read."""
    unchanged: int = 0
    """Audio files whose headers an earlier call has read."""


def write_cuts(cuts: Iterable[Cut], path: Path) -> PreparedManifest:
    """Write a JSONL manifest, one cut per line. It appears at `path` when it is complete.

    Raises:
        UserError: it cannot be written.
    """
    count, seconds = 0, 0.0
    with new_file(path) as file:
        for cut in cuts:
            file.write(line_of(cut.to_dict()))
            count += 1
            seconds += cut.duration
    return PreparedManifest(path, count, seconds / 3600)


def line_of(cut: dict[str, Any]) -> str:
    """The line of a cut in a manifest."""
    return json.dumps(cut, ensure_ascii=False) + "\n"
