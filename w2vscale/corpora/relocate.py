"""Change the paths of audio files in a manifest, after a corpus was moved."""

from __future__ import annotations

import json
import os
from pathlib import Path

from w2vscale.corpora.index import build_index
from w2vscale.data.cuts import read_cut, sources_in
from w2vscale.data.manifest import check_manifest
from w2vscale.errors import UserError
from w2vscale.files import nearest_path, new_file


def relocate(manifest: Path, old: Path, new: Path) -> tuple[int, int]:
    """Replace the folder `old` by `new` in the paths of a manifest, and index it; returns how many paths and cuts.

    The manifest is replaced when the new one is complete. Raises UserError if no path is below `old`, the first file is
    not at its new place, a line is not a cut, or the manifest cannot be written.
    """
    check_manifest(manifest)
    before, after = (os.path.abspath(folder) + "/" for folder in (old, new))
    changed = cuts = 0
    with manifest.open("rb") as lines, new_file(manifest, "wb") as file:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            cut = read_cut(line, where=f"{manifest}: line {number}")
            moved = [source for source in sources_in(cut) if str(source["source"]).startswith(before)]
            for source in moved:
                source["source"] = after + source["source"].removeprefix(before)
            if moved and not changed and not os.path.isfile(first := moved[0]["source"]):
                raise UserError(f"{manifest}: {first} would be its first file: no such file{nearest_path(first)}")
            file.write((json.dumps(cut, ensure_ascii=False) + "\n").encode() if moved else line)
            changed += len(moved)
            cuts += 1
        if not changed:
            raise UserError(f"{manifest}: no file in it is below {before[:-1]}; its first path is {_first(manifest)}")
    build_index(manifest)
    return changed, cuts


def _first(manifest: Path) -> str:
    with manifest.open("rb") as lines:
        line = next(line for line in lines if not line.isspace())
    return str(next(sources_in(read_cut(line, where=str(manifest))))["source"])
