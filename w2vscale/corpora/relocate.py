"""Change the paths or URLs of audio in manifests, after a corpus was moved."""

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
from w2vscale.storage.objects import Missing, version
from w2vscale.storage.urls import Url


class Relocated(NamedTuple):
    """Numbers of paths: changed ones, those among them that lead to no file, and those that are not below `old`.

    Of URLs, only the first is looked up.
    """

    changed: int
    missing: int
    others: int


def relocate(manifests: Sequence[Path], old: Path | Url, new: Path | Url) -> dict[Path, Relocated]:
    """Replace the folder `old` by `new` in the paths of manifests, and index them.

    With URLs, files become objects (sources of the type `url`) or the reverse. Relative paths change if they begin with
    `old` as it is given. The manifests are replaced when all new ones are complete. Raises UserError if one has no path
    below `old`, its first file is not at its new place, a line is not a cut, or a manifest cannot be written.
    """
    manifests = list({os.path.abspath(manifest): manifest for manifest in manifests}.values())
    for manifest in manifests:
        check_manifest(manifest)
    move = _Move.between(old, new)
    with ExitStack() as stack:
        found = {
            manifest: _write(manifest, stack.enter_context(new_file(manifest, "wb")), move) for manifest in manifests
        }
    for manifest in manifests:
        build_index(manifest, schemes=move.schemes)
    return found


class _Move(NamedTuple):
    """What changes: pairs of an old and a new folder, and the types of the sources there, `file` or `url`."""

    folders: list[tuple[str, str]]
    before: str
    after: str
    schemes: tuple[str, ...]

    @classmethod
    def between(cls, old: Path | Url, new: Path | Url) -> _Move:
        def whole(folder: Path | Url) -> str:
            return (folder if isinstance(folder, Url) else os.path.abspath(folder)).rstrip("/")

        folders = [(whole(old), whole(new))]
        if isinstance(old, Path) and not old.is_absolute():
            folders.append((str(old), str(new).rstrip("/")))
        schemes = [folder.scheme for folder in (old, new) if isinstance(folder, Url)]
        before, after = ("url" if isinstance(folder, Url) else "file" for folder in (old, new))
        return cls(folders, before, after, ("file", *schemes))

    def moved(self, path: str) -> str | None:
        """The new path of a file; None if it is below none of the old folders."""
        return next((new + path.removeprefix(old) for old, new in self.folders if path.startswith(f"{old}/")), None)

    def exists(self, path: str) -> bool:
        """Whether a file or object is at its new place."""
        if self.after == "file":
            return os.path.isfile(path)
        try:
            version(Url(path))
        except Missing:
            return False
        return True


def _write(manifest: Path, file: IO[bytes], move: _Move) -> Relocated:
    """Write a manifest with its new paths."""
    changed = missing = others = 0
    first = ""
    with manifest.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            cut = read_cut(line, where=f"{manifest}: line {number}", schemes=move.schemes)
            before = changed
            for source in sources_in(cut):
                path = str(source["source"])
                first = first or path
                # Only the recording itself may have URLs, not what is nested in its transforms.
                movable = source["type"] == move.before and (
                    move.after == "file" or any(source is own for own in cut["recording"]["sources"])
                )
                if not movable or (moved := move.moved(path)) is None:
                    others += 1
                    continue
                source["type"], source["source"] = move.after, moved
                if not changed or move.after == "file":
                    missing += not move.exists(moved)
                if missing and not changed:
                    hint = nearest_path(moved) if move.after == "file" else ""
                    raise UserError(f"{manifest}: {moved} would be its first file: no such file{hint}")
                changed += 1
            file.write((json.dumps(cut, ensure_ascii=False) + "\n").encode() if changed > before else line)
    if not changed:
        absolute = not first or os.path.isabs(first) or move.before == "url"
        (old, _), hint = move.folders[0 if absolute else -1], "" if absolute else "; give OLD as it begins there"
        raise UserError(f"{manifest}: no file in it is below {old}; its first path is {first or 'missing'}{hint}")
    return Relocated(changed, missing, others)
