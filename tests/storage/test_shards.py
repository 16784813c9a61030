"""Shards at a URL: the stream is that of the same shards in files."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.batches import same
from tests.helpers.micro import MICRO_RUN
from tests.helpers.stores import free_port
from w2vscale.config import load_config
from w2vscale.corpora.shar import write_shards
from w2vscale.data.assembly import Assembler
from w2vscale.data.micro_batch import MicroBatch
from w2vscale.data.shard_index import INDEX
from w2vscale.data.shards import find_shards
from w2vscale.data.stream import StreamedMicroBatches, open_stream
from w2vscale.errors import UserError
from w2vscale.objectives import build_objective
from w2vscale.storage import objects
from w2vscale.storage.objects import Missing, Unreachable, delete, read_ranges, upload, write
from w2vscale.storage.urls import Url

STREAM = ("data.mode=stream", "data.min_seconds=0.5", "batch.micro_batches=4", "data.stream_buffer=8")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of six utterances."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [write_audio(folder / f"u{n:02d}.flac", noise(1.0 + 0.1 * n, seed=n)) for n in range(18)]
    write_shards(write_manifest(folder / "cuts.jsonl", [cut_of(path) for path in paths]), folder / "shar", shard_size=6)
    return folder / "shar"


@pytest.fixture
def uploaded(shards: Path, bucket: Url) -> Url:
    for path in shards.iterdir():
        upload(path, bucket / "shar" / path.name)
    return bucket / "shar"


def stream_of(folder: Path | Url, *overrides: str) -> StreamedMicroBatches:
    config = load_config("base", [*MICRO_RUN, *STREAM, f"data.train={folder}", *overrides])
    assemble = Assembler(build_objective(config), config.model, seed=config.trainer.seed)
    return open_stream(assemble, model=config.model, data=config.data, batch=config.batch)


def batches(stream: StreamedMicroBatches, updates: int = 4) -> list[MicroBatch]:
    windows = stream.windows(range(updates), micro_batches=4, rank=0, world_size=1)
    return list(chain.from_iterable(windows))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_files(shards: Path, uploaded: Url, workers: int) -> None:
    local, remote = stream_of(shards), stream_of(uploaded, f"data.workers={workers}")
    assert remote.describe() == local.describe()
    assert all(same(one, other) for one, other in zip(batches(local), batches(remote), strict=True))


def test_a_shard_that_is_gone_is_bad_audio(shards: Path, uploaded: Url) -> None:
    stream = stream_of(uploaded)
    delete([find_shards(uploaded)[1].recording])
    bad = [each for batch in batches(stream, 5) for each in batch.bad]
    assert bad and all("recording.000001.tar: no such object" in each.reason for each in bad)
    assert all(each.file == f"{uploaded}/recording.000001.tar" for each in bad)


def test_a_store_that_is_away_ends_the_run(uploaded: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(uploaded)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(objects, "_opened", {})
    with pytest.raises(Unreachable, match=r"the store cannot be used now"):
        batches(stream)


def test_a_folder_without_index_or_with_another_one_is_one_line(shards: Path, uploaded: Url) -> None:
    write(uploaded / "cuts.000002.jsonl.gz", b"")
    with pytest.raises(
        UserError, match=r"cuts.000002.jsonl.gz: changed since it was indexed; .* before it is uploaded"
    ):
        stream_of(uploaded)
    delete([uploaded / INDEX])
    with pytest.raises(UserError, match=r"shar: has no index; create it with: w2vscale data index, on the folder"):
        stream_of(uploaded)
    with pytest.raises(UserError, match="no/where: holds no shards"):
        stream_of(uploaded / "no/where")


def test_ranges(bucket: Url) -> None:
    write(bucket / "x", bytes(range(100)))
    ranges = [(0, 3), (3, 2), (10, 1), (97, 9)]
    assert read_ranges(bucket / "x", ranges) == [b"\0\1\2", b"\3\4", b"\n", b"abc"]
    assert read_ranges(bucket / "x", []) == []
    with pytest.raises(Missing, match="y: no such object"):
        read_ranges(bucket / "y", [(0, 1)])
    with pytest.raises(Missing, match="x: ends before byte 205"):
        read_ranges(bucket / "x", [(0, 1), (200, 5)])
