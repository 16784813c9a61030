"""Change the paths of audio files in a manifest, after a corpus was moved."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from w2vscale.corpora.index import build_index
from w2vscale.data.cuts import read_cut, sources_in
from w2vscale.data.manifest import check_manifest
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, new_file


class Relocated(NamedTuple):
    """Numbers of paths: changed ones, those among them that lead to no file, and those that are not below `old`."""

    changed: int
    missing: int
    others: int


def relocate(manifest: Path, old: Path, new: Path) -> Relocated:
    """Replace the folder `old` by `new` in the paths of a manifest, and index it.

    The manifest is replaced when the new one is complete. Raises UserError if no path is below `old`, the first file is
    not at its new place, a line is not a cut, or the manifest cannot be written.
    """
    check_manifest(manifest)
    before, after = (os.path.abspath(folder).rstrip("/") + "/" for folder in (old, new))
    changed = missing = others = 0
    with manifest.open("rb") as lines, new_file(manifest, "wb") as file:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            cut = read_cut(line, where=f"{manifest}: line {number}")
            sources = [*sources_in(cut)]
            moved = [source for source in sources if str(source["source"]).startswith(before)]
            for source in moved:
                source["source"] = path = after + source["source"].removeprefix(before)
                missing += not os.path.isfile(path)
                if missing and not changed:
                    raise UserError(f"{manifest}: {path} would be its first file: no such file{nearest_path(path)}")
                changed += 1
            file.write((json.dumps(cut, ensure_ascii=False) + "\n").encode() if moved else line)
            others += len(sources) - len(moved)
        if not changed:
            raise UserError(f"{manifest}: no file in it is below {before[:-1]}; its first path is {_first(manifest)}")
    build_index(manifest)
    return Relocated(changed, missing, others)


def _first(manifest: Path) -> str:
    with manifest.open("rb") as lines:
        line = next(line for line in lines if not line.isspace())
    return str(next(sources_in(read_cut(line, where=str(manifest))))["source"])
