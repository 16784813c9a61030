"""Write Lhotse Shar: audio in shards that are read sequentially, for storage with slow random access."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from lhotse.cut import Cut
from lhotse.shar import SharWriter

from w2vscale.corpora.parallel import WHOLE, Part, Progress, chunked, no_progress, parallel_map
from w2vscale.corpora.shard_index import index_shards
from w2vscale.data.audio import own_decoders, read_audio
from w2vscale.data.cuts import NotACut
from w2vscale.data.decoding import AudioError, reason_of
from w2vscale.data.manifest import Manifest
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.randomness import Stream, generator
from w2vscale.data.resampling import at_rate
from w2vscale.errors import UserError
from w2vscale.files import append_records, read_records, write_text, writing

FORMATS = ("flac", "wav", "opus", "mp3")
OPUS_RATE = 48_000  # Hz; Opus supports only a few rates


@dataclass(frozen=True)
class WrittenShards:
    """The number of shards in the folder, and for this call that of utterances and the bad ones that were left out."""

    shards: int
    utterances: int
    bad: list[BadAudio]


def write_shards(
    manifest: Path,
    folder: Path,
    *,
    shard_size: int = 1000,
    form: str = "flac",
    seed: int = 0,
    jobs: int = 1,
    part: Part = WHOLE,
    progress: Progress = no_progress,
) -> WrittenShards:
    """Write the utterances of an indexed manifest as indexed shards of `shard_size` utterances, in a random order.

    Utterances without usable audio are left out. Complete shards of an earlier call that was stopped are kept. `form`
    is flac, wav, opus or mp3; `progress` counts shards. With `part`, only shards of this part are written; calls for
    different parts can run at the same time, and a call for the whole then writes what is missing and the index.

    Raises UserError if the manifest has no index, has audio that is not in files or none that can be used, or the
    folder cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    folder = folder.absolute()  # Lhotse would run a relative path that begins with "pipe:"
    if "%" in str(folder):
        raise UserError(f"{folder}: shards cannot be written to a path with a %; choose another folder")
    total = len(Manifest(manifest))
    order = generator(seed, Stream.SHARDS).permutation(total).tolist()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, f"{manifest.resolve()}, {total} utterances, {shard_size} per shard, {form}, seed {seed}")
    shards = list(enumerate(chunked(order, shard_size)))
    shards = [shards[number] for number in part.range(len(shards))]
    total = sum(len(numbers) for _, numbers in shards)
    bad: list[BadAudio] = []
    found = parallel_map(partial(_write_shard, manifest, folder, form), shards, jobs=jobs, source=manifest)
    for done, left_out in enumerate(found, start=1):
        bad += left_out
        progress(done, len(shards))
    if part != WHOLE:
        written = sum((folder / f"cuts.{number:06d}.jsonl.gz").is_file() for number, _ in shards)
        return WrittenShards(written, total - len(bad), bad)
    if len(bad) == total:
        raise UserError(f"{manifest}: no utterance can be used, so no shards were written; the first one: {bad[0]}")
    indexed = index_shards(folder, jobs=jobs)
    return WrittenShards(indexed.shards, indexed.utterances, bad + indexed.bad)


def _claim(folder: Path, contents: str) -> None:
    """Record the contents of the folder, so that a later call with other contents is refused."""
    note = folder / "contents.txt"
    if not note.is_file():
        if any(folder.glob("cuts.*.jsonl*")):
            raise UserError(f"{folder}: already contains shards; choose another folder")
        write_text(note, contents + "\n")
    elif (found := note.read_text(encoding="utf-8", errors="replace").strip()) != contents:
        raise UserError(f"{folder}: contains other shards ({found}); choose another folder")


def _write_shard(path: Path, folder: Path, form: str, shard: tuple[int, Sequence[int]]) -> list[BadAudio]:
    """Write a shard and a list of the utterances left out, first in a temporary folder; returns these utterances."""
    suffix = f"{shard[0]:06d}"
    cuts, log = folder / f"cuts.{suffix}.jsonl.gz", folder / f"bad_audio.{suffix}.jsonl"
    if cuts.is_file():
        return _listed(log) if log.is_file() else []
    manifest = Manifest(path)
    bad = []
    partial_folder = folder / f"partial.{suffix}"
    shutil.rmtree(partial_folder, ignore_errors=True)
    with writing(cuts):
        partial_folder.mkdir()
        with SharWriter(str(partial_folder), {"recording": form}, shard_size=None, shard_suffix=f".{suffix}") as writer:
            for number in shard[1]:
                try:
                    cut = manifest.cut(number)
                    _write(writer, cut, OPUS_RATE if form == "opus" else cut.sampling_rate)
                except NotACut as error:
                    bad.append(BadAudio.of_line(number, error))
                except AudioError as error:
                    bad.append(BadAudio.of(cut, error))
        if bad:
            append_records(partial_folder / log.name, map(asdict, bad))
        # The cuts last: they mark a complete shard.
        for name in (log.name, f"recording.{suffix}.tar", cuts.name):
            if (partial_folder / name).is_file():
                (partial_folder / name).replace(folder / name)
        partial_folder.rmdir()
    return bad


def _listed(log: Path) -> list[BadAudio]:
    try:
        return [BadAudio(**record) for record in read_records(log)]
    except (TypeError, RecursionError):
        raise UserError(f"{log}: damaged; delete it, and the shard that it belongs to, to write it again") from None


def _write(writer: SharWriter, cut: Cut, sampling_rate: int) -> None:
    """Raises AudioError, before anything is written, if the cut has no usable audio or it cannot be encoded."""
    read_audio(cut, sampling_rate=cut.sampling_rate)
    try:
        with own_decoders():
            writer.write(at_rate(cut, sampling_rate))
    except OSError:
        raise
    except Exception as error:  # Lhotse raises many types of errors
        raise AudioError("undecodable", f"cannot be encoded: {reason_of(error)}") from None
