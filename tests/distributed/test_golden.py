"""The curve of `tiny`, update by update, is what it was when it was written down, under every engine.

python -m tests.distributed.test_golden      writes it down anew, from DDP's, where it is meant to change
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import cut_of, noise, write_audio, write_manifest
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_tiny
from tests.helpers.tiers import long_except
from tools.bench.engine_parity import ENGINES

pytestmark = pytest.mark.distributed

GOLDEN = Path(__file__).with_name("golden_tiny.json")
UPDATES = 30
SETTINGS = (
    f"trainer.updates={UPDATES}", "data.max_seconds=2", "data.workers=0", "batch.max_seconds=4",
    "batch.micro_batches=1", "schedule.warmup_updates=10", "checkpoint.every=1000",
)  # fmt: skip


def write_corpus(folder: Path) -> Path:
    paths = [write_audio(folder / f"{n:02d}.flac", noise(1.0 + 0.1 * n, seed=100 + n)) for n in range(16)]
    return write_manifest(folder / "cuts.jsonl", [cut_of(path) for path in paths])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("engine", long_except({"ddp", "fsdp", "zero3"}, ENGINES))
def test_the_curve_is_the_golden_one(pool: Callable[[int], Pool], corpus: Path, tmp_path: Path, engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    found = pool(1).run(train_tiny, str(corpus), str(tmp_path), (*SETTINGS, ENGINES[engine]))[0]
    golden = json.loads(GOLDEN.read_text())
    assert len(found) == len(golden) == UPDATES
    # Other processors add up in another order; what this is for changes more.
    for (loss, norm), (golden_loss, golden_norm) in zip(found, golden, strict=True):
        assert loss == pytest.approx(golden_loss, rel=2e-4)
        assert norm == pytest.approx(golden_norm, rel=2e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        there = Path(temporary)
        curve = train_tiny(str(write_corpus(there)), str(there / "exp"), SETTINGS)
    GOLDEN.write_text(json.dumps(curve, indent=1) + "\n")
