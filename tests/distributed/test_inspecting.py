"""Samples and histograms on engines that shard: collective, and without an effect on the run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.audio import SmallCorpus
from tests.helpers.pool import Pool
from tests.helpers.tasks import train_micro
from tests.helpers.tiers import long_except
from tests.training.test_resume import weights

pytestmark = pytest.mark.distributed
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

ENGINES = {
    "ddp": "engine.name=ddp",
    "fsdp": "engine.name=fsdp",
    "fsdp_hybrid": "engine={name: fsdp, shard_size: 1}",
    "zero2": "engine={name: deepspeed, deepspeed_config: zero2}",
    "zero3": "engine={name: deepspeed, deepspeed_config: zero3}",
}


@pytest.mark.parametrize("name", long_except({"fsdp"}, ENGINES))
def test_inspection_does_not_change_a_run(
    pool: Callable[[int], Pool], small_corpus: SmallCorpus, tmp_path: Path, name: str
) -> None:
    every = ("logging.samples_every=1", "logging.histograms_every=1", "logging.attention_layers=[1,-1]")
    settings = (f"data.validation={small_corpus.validation}", "trainer.validate_every=2", "trainer.updates=4")
    for folder, overrides in (("with", every), ("without", ())):
        given = (*settings, *overrides, ENGINES[name])
        pool(2).run(train_micro, str(small_corpus.train), str(tmp_path / folder), given)
    with_, without = tmp_path / "with", tmp_path / "without"
    assert weights(with_) == weights(without)
    names = {path.name for path in (with_ / "samples" / "update_00000004").iterdir()}
    assert names >= {"1_spectrogram.png", "attention_block_01.png", "attention_block_03.png", "codes_usage.png"}
    notes = [json.loads(line) for line in (with_ / "logs" / "notes.jsonl").read_text().splitlines()]
    counted = {note["name"]: sum(note["histogram"]["counts"]) for note in notes if "histogram" in note}
    assert counted["weights/encoder.transformer.blocks.0.attention.qkv.weight"] == 32 * 96
    assert counted["weights/quantizer.codevectors"] == 2 * 16 * 8
