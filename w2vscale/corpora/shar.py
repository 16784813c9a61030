"""Lhotse Shar: a manifest's audio in shards that are read in sequence, for storage that is slow at random access."""

from __future__ import annotations

import json
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

FORMATS = ("flac", "wav", "opus", "mp3")

OPUS_RATE = 48_000
"""The rate that Opus is written at, in Hz: it has few others."""


@dataclass(frozen=True)
class Written:
    """What shards were written, and what was left out of them."""

    shards: int
    utterances: int
    bad: list[BadAudio]


@dataclass(frozen=True)
class _Job:
    """One shard: these utterances of a manifest."""

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
) -> Written:
    """Write shards of an indexed manifest's utterances, in an order drawn from `seed`; those without usable audio
    are left out. Shards that are there already, of an earlier call that was stopped, are kept.

    Raises:
        UserError: the manifest has no index, none of its audio can be used, or the folder cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    total = len(Manifest(manifest))
    order = generator(seed, Stream.SHARDS).permutation(total)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, f"{manifest.resolve()}, {total} utterances, {shard_size} a shard, {form}, seed {seed}")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
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
            f"{manifest}: none of its {total} utterances can be used; the first: {bad[0].utterance} ({bad[0].file}): "
            f"{bad[0].reason}; no shards were written"
        )
    return Written(sum(1 for _ in folder.glob("cuts.*.jsonl.gz")), total - len(bad), bad)


def _claim(folder: Path, contents: str) -> None:
    """Note what the folder's shards are of, so that those of another corpus are not taken for them."""
    note = folder / "contents.txt"
    if not note.is_file():
        if any(folder.glob("cuts.*.jsonl*")):
            raise UserError(f"{folder}: holds shards already; choose another folder")
        note.write_text(contents + "\n", encoding="utf-8")
    elif (there := note.read_text(encoding="utf-8").strip()) != contents:
        raise UserError(f"{folder}: holds shards of other contents ({there}); choose another folder")


def _write_shard(job: _Job) -> list[BadAudio]:
    """Write a shard, and beside it a list of what was left out; in another folder first, so that it is whole."""
    cuts, recording, log = (
        job.folder / name
        for name in (f"cuts.{job.number}.jsonl.gz", f"recording.{job.number}.tar", f"bad_audio.{job.number}.jsonl")
    )
    if cuts.is_file():
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        return [BadAudio(**json.loads(line)) for line in lines]
    manifest = Manifest(job.manifest)
    bad = []
    partial = job.folder / f"partial.{job.number}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
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
            (partial / log.name).write_text("".join(json.dumps(asdict(one)) + "\n" for one in bad), encoding="utf-8")
        # The cuts last: where they are, the rest is.
        for path in (log, recording, cuts):
            if (partial / path.name).is_file():
                (partial / path.name).replace(path)
        partial.rmdir()
    except OSError as error:
        raise UserError(f"{cuts}: cannot be written: {error.strerror or error}") from None
    return bad
