"""Write cut manifests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from w2vscale.errors import UserError
from w2vscale.files import nearest_path, new_file


@dataclass(frozen=True)
class PreparedManifest:
    """A manifest that was written."""

    path: Path
    utterances: int
    hours: float


def existing_folder(path: Path) -> Path:
    """The absolute path of a folder. Raises UserError if there is no such folder."""
    if not os.path.isdir(path):
        problem = "not a folder" if os.path.exists(path) else f"no such folder{nearest_path(path)}"
        raise UserError(f"{path}: {problem}")
    return path.resolve()


def write_cuts(cuts: Iterable[Cut], path: Path) -> PreparedManifest:
    """Write a JSONL manifest, one cut per line; it appears at `path` when it is complete.

    Raises UserError if it cannot be written.
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
