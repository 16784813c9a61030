"""Shards of a small corpus, the stream that reads them, and ways to damage them."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from numpy.typing import NDArray

from tests.helpers.audio import write_manifest
from w2vscale.config import Config, load_config
from w2vscale.data.assembly import Assembler
from w2vscale.data.audio import read_audio
from w2vscale.data.shards import StoredUtterance
from w2vscale.data.stream import StreamedMicroBatches, open_stream
from w2vscale.objectives import build_objective

RATE = 16_000


def config_with(*overrides: str) -> Config:
    settings = ["data.mode=stream", "data.max_seconds=3", "data.min_seconds=1", "data.workers=0"]
    return load_config("tiny", [*settings, "batch.max_seconds=10", "batch.micro_batches=6", *overrides])


LONG = ("batch.micro_batches=12", "data.stream_buffer=15", "data.min_seconds=0.5")
"""Several blocks, and windows that several numbers of ranks can share."""


def stream_of(folders: list[Path], config: Config) -> StreamedMicroBatches:
    data = config.data.model_copy(update={"train": folders})
    assemble = Assembler(build_objective(config), config.model, seed=config.trainer.seed)
    return open_stream(assemble, model=config.model, data=data, batch=config.batch)


def cuts_of(folder: Path) -> list[Cut]:
    fields = {name: sorted(folder.glob(f"{name}.*")) for name in ("cuts", "recording")}
    return list(CutSet.from_shar(fields=fields))


def audio_of(cut: Cut) -> NDArray[np.float32]:
    samples = round(cut.duration * RATE)
    return read_audio(cut, sampling_rate=RATE, offset=0, length=samples, normalize=False)


def cut_from(stored: StoredUtterance) -> Cut:
    cut = stored.cut()
    assert isinstance(cut, Cut), cut
    return cut


def resident_megabytes(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def repeated(manifest: Path, path: Path, times: int) -> Path:
    """A manifest with all utterances of another several times."""
    cuts = [cut.with_id(f"{cut.id}-{n}") for n in range(times) for cut in CutSet.from_jsonl(manifest)]
    return write_manifest(path, cuts)


def rewrite(archive: Path, rename: Callable[[int, str], str | None]) -> None:
    """Rename the members of an archive, or leave out those without a new name."""
    members = []
    with tarfile.open(archive) as old:
        for place, member in enumerate(old):
            content = old.extractfile(member)
            assert content is not None
            member.name = rename(place, member.name) or ""
            members.append((member, content.read()))
    with tarfile.open(archive, "w") as new:
        for member, content in members:
            if member.name:
                new.addfile(member, io.BytesIO(content))


def break_archive(folder: Path) -> Path:
    """Cut an archive short in the middle of an utterance."""
    archive = folder / "recording.000001.tar"
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    return archive


MANIFEST_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "other bytes": lambda whole: whole[: len(whole) // 2] + bytes(40) + whole[len(whole) // 2 + 40 :],
    "other lines": lambda whole: gzip.compress(b"[1, 2]\nnull\n"),
}
