"""tools/bench/launches.py: the operations of an update on a GPU, counted without one."""

from __future__ import annotations

import pytest

from tests.helpers.micro import MICRO_MODEL
from tools.bench.launches import count
from w2vscale.config import Config, load_config


def config_of(preset: str, layers: int) -> Config:
    settings = [*MICRO_MODEL, "precision.compute=bf16", "regularization.layerdrop=0", f"model.layers={layers}"]
    return load_config(preset, settings)


@pytest.mark.parametrize("preset", ["base", "large_lv60"])
def test_a_block_casts_no_weight_and_copies_queries_keys_and_values_once(preset: str) -> None:
    shallow, deep = (count(config_of(preset, layers), 5, 1.0) for layers in (2, 5))
    assert shallow["window"] == deep["window"] == {"_foreach_copy_": 1}
    more = {part: deep[part] - shallow[part] for part in ("forward", "backward")}
    assert more["forward"]["_flash_attention_forward"] == more["backward"]["_flash_attention_backward"] == 3
    # Three gradients are stacked into one; nothing else is copied, packed or masked.
    assert more["backward"]["stack"] == 3
    copies = {"clone", "copy_", "index_select", "index_copy", "masked_fill"}
    assert not copies & (more["forward"].keys() | more["backward"].keys())
    # The gradients of weight and bias of four Linear and two LayerNorm become fp32.
    assert (more["forward"]["_to_copy"], more["backward"]["_to_copy"]) == (0, 3 * 12)


def test_the_number_of_operations_does_not_depend_on_the_length_of_a_forward() -> None:
    config = config_of("base", 2)
    assert count(config, 5, 1.0) == count(config, 9, 2.0)
