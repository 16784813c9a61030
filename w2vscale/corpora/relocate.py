"""Change the paths of audio files in manifests, after a corpus was moved."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

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


def relocate(manifests: Sequence[Path], old: Path, new: Path) -> dict[Path, Relocated]:
    """Replace the folder `old` by `new` in the paths of manifests, and index them.

    Relative paths change if they begin with `old` as it is given. The manifests are replaced when all new ones are
    complete. Raises UserError if one has no path below `old`, its first file is not at its new place, a line is not a
    cut, or a manifest cannot be written.
    """
    manifests = list({os.path.abspath(manifest): manifest for manifest in manifests}.values())
    for manifest in manifests:
        check_manifest(manifest)
    folders = [(os.path.abspath(old).rstrip("/"), os.path.abspath(new).rstrip("/"))]
    if not old.is_absolute():
        folders.append((str(old), str(new)))
    with ExitStack() as stack:
        found = {
            manifest: _write(manifest, stack.enter_context(new_file(manifest, "wb")), folders) for manifest in manifests
        }
    for manifest in manifests:
        build_index(manifest)
    return found


def _write(manifest: Path, file: IO[bytes], folders: Sequence[tuple[str, str]]) -> Relocated:
    """Write a manifest with its new paths."""
    changed = missing = others = 0
    first = ""
    with manifest.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            cut = read_cut(line, where=f"{manifest}: line {number}")
            before = changed
            for source in sources_in(cut):
                path = str(source["source"])
                first = first or path
                if (moved := _moved(path, folders)) is None:
                    others += 1
                    continue
                source["source"] = moved
                missing += not os.path.isfile(moved)
                if missing and not changed:
                    raise UserError(f"{manifest}: {moved} would be its first file: no such file{nearest_path(moved)}")
                changed += 1
            file.write((json.dumps(cut, ensure_ascii=False) + "\n").encode() if changed > before else line)
    if not changed:
        absolute = not first or os.path.isabs(first)
        (old, _), hint = folders[0 if absolute else -1], "" if absolute else "; give OLD as it begins there"
        raise UserError(f"{manifest}: no file in it is below {old}; its first path is {first or 'missing'}{hint}")
    return Relocated(changed, missing, others)


def _moved(path: str, folders: Sequence[tuple[str, str]]) -> str | None:
    """The new path of a file; None if it is below none of the old folders."""
    return next((new + path.removeprefix(old) for old, new in folders if path.startswith(f"{old}/")), None)
