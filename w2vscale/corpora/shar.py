"""Write Lhotse Shar: audio in shards that are read sequentially, for storage with slow random access."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lhotse.shar import SharWriter

from w2vscale.corpora.parallel import parallel_map
from w2vscale.data.audio import AudioError, read_audio
from w2vscale.data.manifest import Manifest, audio_path
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.randomness import Stream, generator
from w2vscale.data.resampling import at_rate
from w2vscale.errors import UserError
from w2vscale.files import append_records, read_records, write_text, writing

FORMATS = ("flac", "wav", "opus", "mp3")

OPUS_RATE = 48_000
"""Sampling rate of Opus files in Hz; Opus supports only a few."""


@dataclass(frozen=True)
class WrittenShards:
    """The number of shards and of their utterances, and the bad utterances that were left out."""

    shards: int
    utterances: int
    bad: list[BadAudio]


@dataclass(frozen=True)
class _Job:
    """One shard to write: some utterances of a manifest."""

    manifest: Path
    utterances: list[int]
    folder: Path
    number: str
    form: str


def write_shards(
    manifest: Path,
    folder: Path,
    *,
    shard_size: int = 1000,
    form: str = "flac",
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> WrittenShards:
    """Write the utterances of an indexed manifest as shards of `shard_size`, in a random order.

    Utterances without usable audio are left out. Complete shards of an earlier call that was stopped are kept.

    Args:
        manifest: An indexed manifest.
        folder: Where the shards are written.
        shard_size: Utterances per shard.
        form: Audio format of the shards: flac, wav, opus or mp3.
        seed: Seed of the order of utterances.
        jobs: Parallel processes.
        progress: Called with (shards done, total shards).

    Raises:
        UserError: the manifest has no index, none of its audio can be used, or the folder cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    total = len(Manifest(manifest))
    order = generator(seed, Stream.SHARDS).permutation(total)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, f"{manifest.resolve()}, {total} utterances, {shard_size} per shard, {form}, seed {seed}")
    jobs_of_shards = [
        _Job(manifest, order[start : start + shard_size].tolist(), folder, f"{number:06d}", form)
        for number, start in enumerate(range(0, total, shard_size))
    ]
    bad: list[BadAudio] = []
    for done, found in enumerate(parallel_map(_write_shard, jobs_of_shards, jobs=jobs, source=manifest), start=1):
        bad += found
        if progress is not None:
            progress(done, len(jobs_of_shards))
    if len(bad) == total:
        raise UserError(
            f"{manifest}: no utterance can be used, so no shards were written; the first one: "
            f"{bad[0].utterance} ({bad[0].file}): {bad[0].reason}"
        )
    return WrittenShards(sum(1 for _ in folder.glob("cuts.*.jsonl.gz")), total - len(bad), bad)


def _claim(folder: Path, contents: str) -> None:
    """Record the contents of the folder, so that a later call with other contents is refused."""
    note = folder / "contents.txt"
    if not note.is_file():
        if any(folder.glob("cuts.*.jsonl*")):
            raise UserError(f"{folder}: already contains shards; choose another folder")
        write_text(note, contents + "\n")
    elif (found := note.read_text(encoding="utf-8").strip()) != contents:
        raise UserError(f"{folder}: contains other shards ({found}); choose another folder")


def _write_shard(job: _Job) -> list[BadAudio]:
    """Write a shard and a list of the utterances left out, first in a temporary folder; returns these utterances."""
    cuts, recording, log = (
        job.folder / name
        for name in (f"cuts.{job.number}.jsonl.gz", f"recording.{job.number}.tar", f"bad_audio.{job.number}.jsonl")
    )
    if cuts.is_file():
        return [BadAudio(**record) for record in read_records(log)] if log.is_file() else []
    manifest = Manifest(job.manifest)
    bad = []
    partial = job.folder / f"partial.{job.number}"
    shutil.rmtree(partial, ignore_errors=True)
    with writing(cuts):
        partial.mkdir()
        with SharWriter(
            str(partial), {"recording": job.form}, shard_size=None, shard_suffix=f".{job.number}"
        ) as writer:
            for number in job.utterances:
                cut = manifest.cut(number)
                try:
                    rate = cut.sampling_rate
                    read_audio(cut, sampling_rate=rate, offset=0, length=round(cut.duration * rate), normalize=False)
                except AudioError as error:
                    bad.append(BadAudio(cut.id, audio_path(cut), error.kind, str(error)))
                else:
                    writer.write(at_rate(cut, OPUS_RATE if job.form == "opus" else rate))
        if bad:
            append_records(partial / log.name, map(asdict, bad))
        # The cuts last: they mark a complete shard.
        for path in (log, recording, cuts):
            if (partial / path.name).is_file():
                (partial / path.name).replace(path)
        partial.rmdir()
    return bad
