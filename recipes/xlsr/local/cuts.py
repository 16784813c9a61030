"""Manifests for this recipe: split a corpus into train, dev and test, and select transcribed utterances.

python recipes/xlsr/local/cuts.py split PREPARED OUT --name de
python recipes/xlsr/local/cuts.py transcribed OUT cuts_de_train.jsonl … --language de
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from w2vscale.cli.prepare import show_written
from w2vscale.corpora.manifests import PreparedManifest, line_of
from w2vscale.data.cuts import read_cut
from w2vscale.data.manifest import language_of
from w2vscale.errors import UserError
from w2vscale.files import new_file

PARTS = {"test": {"test"}, "dev": {"dev", "valid", "validation"}}
"""Words in the name of a manifest that make it one for testing or for validation. All others are for training."""
HASHES = 2**32

app = typer.Typer()


@app.command()
def split(
    source: Annotated[Path, typer.Argument(metavar="PREPARED", help="Folder of cuts_*.jsonl.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for cuts_NAME_train.jsonl, … dev and … test.")],
    name: Annotated[str, typer.Option(help="Name of the corpus.")],
    language: Annotated[str, typer.Option(help="Language of all utterances.", show_default="as they are")] = "",
    dev_share: Annotated[float, typer.Option(help="Fraction of the recordings for validation.")] = 0.05,
    test_share: Annotated[float, typer.Option(help="Fraction of the recordings for testing.")] = 0.05,
) -> None:
    """Write one manifest each for training, validation and testing.

    A manifest whose name has the word dev, valid, validation or test keeps its part. If there is none for validation or
    testing, recordings are held out by a hash of their ids: transcribed ones, if there are any. Without transcripts
    there is nothing to test.
    """
    sources = _by_part(source)
    shares = {part: share for part, share in (("dev", dev_share), ("test", test_share)) if part not in sources}
    held_out = _hold_out(sources["train"], shares)
    written = {part: output / f"cuts_{name}_{part}.jsonl" for part in ("train", "dev", "test")}
    counts, seconds = dict.fromkeys(written, 0), dict.fromkeys(written, 0.0)
    with ExitStack() as stack:
        files = {part: stack.enter_context(new_file(path)) for part, path in written.items()}
        for given, paths in sources.items():
            for cut in _cuts(paths):
                part = held_out.get(_hash(cut), given) if given == "train" else given
                files[part].write(line_of(_in_language(cut, language) if language else cut))
                counts[part] += 1
                seconds[part] += cut["duration"]
    for part in written:
        if not counts[part]:
            written[part].unlink()
    show_written(
        [PreparedManifest(written[part], counts[part], seconds[part] / 3600) for part in written if counts[part]]
    )
    for part in ("train", "dev"):
        if not counts[part]:
            raise UserError(f"{source}: no utterance for {part}")


@app.command()
def transcribed(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for manifests of the same names.")],
    manifests: Annotated[list[Path], typer.Argument(metavar="CUTS.jsonl...", help="Manifests of all utterances.")],
    language: Annotated[str, typer.Option(help="Only utterances in this language.", show_default="all")] = "",
) -> None:
    """Write manifests of the transcribed utterances. A manifest without any is not written."""
    for manifest in manifests:
        path, count, seconds = output / manifest.name, 0, 0.0
        with new_file(path) as file:
            for cut in _cuts([manifest]):
                if _has_text(cut) and language in ("", language_of(cut)):
                    file.write(line_of(cut))
                    count += 1
                    seconds += cut["duration"]
        if count:
            show_written([PreparedManifest(path, count, seconds / 3600)])
        else:
            path.unlink()


def _by_part(folder: Path) -> dict[str, list[Path]]:
    """The manifests in a folder, for each part that there are any for."""
    sources: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("cuts_*.jsonl")):
        words = set(re.split(r"[^a-z]+", path.stem.lower()))
        part = next((part for part, names in PARTS.items() if words & names), "train")
        sources.setdefault(part, []).append(path)
    if not sources:
        raise UserError(f"{folder}: has no cuts_*.jsonl; write them with: w2vscale data prepare")
    if "train" not in sources:
        raise UserError(f"{folder}: has manifests for {' and '.join(sources)}, but none for training")
    return sources


def _cuts(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield read_cut(line, where=f"{path}: line {number}")


def _hold_out(paths: Sequence[Path], shares: dict[str, float]) -> dict[int, str]:
    """The hashes of the recordings for each part in `shares`: at least one recording, if its share is not 0.

    A recording that is added later does not move others, except in a very small corpus.
    """
    if not any(shares.values()):
        return {}
    all_hashes, with_text = set[int](), set[int]()
    for cut in _cuts(paths):
        all_hashes.add(_hash(cut))
        if _has_text(cut):
            with_text.add(_hash(cut))
    if not with_text:
        shares = {part: share for part, share in shares.items() if part != "test"}
    candidates = np.array(sorted(with_text or all_hashes), np.int64)
    held_out: dict[int, str] = {}
    start = 0
    for part, share in shares.items():
        start, chosen = _next(candidates, start, share)
        held_out |= dict.fromkeys(chosen.tolist(), part)
    if len(held_out) == len(candidates):
        recordings = f"{len(candidates)} {'transcribed ' if with_text else ''}recordings"
        raise UserError(f"{paths[0]}: {recordings} are too few to hold out some for {' and '.join(shares)}")
    return held_out


def _next(hashes: NDArray[np.int64], start: int, share: float) -> tuple[int, NDArray[np.int64]]:
    """The sorted `hashes` from `start` on within a share of all possible ones, but at least one; and where they end."""
    rest = hashes[hashes >= start]
    end = start + round(share * HASHES)
    if share and rest.size:
        end = max(end, int(rest[0]) + 1)
    return end, rest[rest < end]


def _hash(cut: dict[str, Any]) -> int:
    return zlib.crc32(cut["recording"]["id"].encode(errors="surrogateescape"))


def _has_text(cut: dict[str, Any]) -> bool:
    return any((supervision.get("text") or "").strip() for supervision in cut.get("supervisions") or ())


def _in_language(cut: dict[str, Any], language: str) -> dict[str, Any]:
    if cut.get("supervisions"):
        return cut | {"supervisions": [one | {"language": language} for one in cut["supervisions"]]}
    return cut | {"custom": (cut.get("custom") or {}) | {"language": language}}


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
