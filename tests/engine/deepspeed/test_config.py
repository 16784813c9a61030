"""DeepSpeed's JSON: what the run fixes is merged in, what contradicts or is unknown is one line."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.zero_files import ZERO_FILES
from w2vscale.config import Config, load_config
from w2vscale.engine.deepspeed import config as module
from w2vscale.engine.deepspeed.config import (
    FOLDERS,
    VERSION,
    check_partition_size,
    deepspeed_config,
    import_deepspeed,
    validate_zero,
)
from w2vscale.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
NAMES = sorted(path.stem for path in FOLDERS[0].glob("*.json"))
ZERO = {"stage": 2}

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def config_for(path: Path | str, *overrides: str) -> Config:
    return load_config("base", [f"engine.deepspeed_config={path}", *overrides])


def document_of(config: Config) -> dict[str, Any]:
    return deepspeed_config(config.engine, config.optim, config.precision)


def write(folder: Path, tree: Any) -> Path:
    path = folder / "zero.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def merged(folder: Path, tree: Any, *overrides: str) -> dict[str, Any]:
    return document_of(config_for(write(folder, tree), *overrides))


def refused(folder: Path, tree: Any, *overrides: str, by_deepspeed: bool = False) -> str:
    """What is said about a file, without the file's name, which must come first."""
    path = write(folder, tree)
    if by_deepspeed:
        import_deepspeed(torch.device("cpu"))
        document = document_of(config_for(path, *overrides))
        with pytest.raises(UserError) as caught:
            validate_zero(document, str(path))
    else:
        with pytest.raises(UserError) as caught:
            document_of(config_for(path, *overrides))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def test_there_is_a_file_for_each_stage_and_kind_of_offloading() -> None:
    assert NAMES == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_offload"]


@pytest.mark.parametrize("name", NAMES)
def test_our_files_are_merged_with_what_the_run_fixes(name: str) -> None:
    document = document_of(config_for(name, "optim.max_norm=2.5", "precision.compute=bf16"))
    assert document["zero_optimization"]["stage"] == int(name[4])
    assert document["gradient_clipping"] == 2.5
    assert document["bf16"] == {"enabled": True}
    assert document["data_types"] == {"grad_accum_dtype": "fp32"}
    assert document["communication_data_type"] == "fp32"
    assert document["managed_gradient_accumulation"] is False


@needs_deepspeed
@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_accepts_our_files(name: str) -> None:
    import_deepspeed(torch.device("cpu"))
    validate_zero(document_of(config_for(name)), name)


def test_a_run_that_never_clips_says_so_since_deepspeed_clips_by_default() -> None:
    assert document_of(config_for("zero1", "optim.max_norm=null"))["gradient_clipping"] == 0.0


def test_what_agrees_is_taken(tmp_path: Path) -> None:
    tree = {
        "zero_optimization": ZERO, "gradient_clipping": 1.0, "fp16": {"enabled": False, "loss_scale": 0},
        "bfloat16": {"enabled": True}, "optimizer": {"type": "AdamW"}, "scheduler": {}, "steps_per_print": 7,
    }  # fmt: skip
    expected = merged(tmp_path, {"zero_optimization": ZERO}) | {"steps_per_print": 7}
    assert merged(tmp_path, tree) == expected


def test_auto_is_left_to_the_run_and_to_deepspeed(tmp_path: Path) -> None:
    """The file of Transformers' tutorial on ZeRO-3, but for its scheduler's type."""
    auto = "auto"
    tree = {
        "fp16": {"enabled": auto, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
                 "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": auto},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), auto)},
        "scheduler": {"type": auto, "params": dict.fromkeys(("warmup_min_lr", "warmup_num_steps"), auto)},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": auto}, "overlap_comm": True,
            "sub_group_size": 1e9, "reduce_bucket_size": auto, "stage3_prefetch_bucket_size": auto,
            "stage3_param_persistence_threshold": auto, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": auto, "gradient_clipping": auto, "steps_per_print": 2000,
        "train_batch_size": auto, "train_micro_batch_size_per_gpu": auto, "wall_clock_breakdown": False,
    }  # fmt: skip
    document = merged(tmp_path, tree)
    assert "auto" not in json.dumps(document)
    assert document["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True, "sub_group_size": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    }  # fmt: skip
    assert not {"fp16", "optimizer", "scheduler", "train_batch_size"} & document.keys()
    tree["scheduler"] = {"type": "WarmupLR"}
    said = refused(tmp_path, tree)
    assert said == 'scheduler.type="WarmupLR": decided by schedule.kind; remove it from this file'


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("{", "not valid JSON: "),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "not valid JSON: stage is given twice"),
        ("[]", "expected an object with a section zero_optimization, got a list"),
        ({}, "zero_optimization: expected an object with a stage, got null"),
        ({"zero_optimization": True}, "zero_optimization: expected an object with a stage, got true"),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage="2": must be 1, 2 or 3'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true: must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage=0: must be 1, 2 or 3; for stage 0 choose"),
        ({"zero_optimization": {}}, "zero_optimization.stage=null: must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage=null: must be 1, 2 or 3"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_zero_json(tmp_path: Path, tree: Any, message: str) -> None:
    assert refused(tmp_path, tree).startswith(message)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping: unknown key, or one that has no effect here; did you mean gr"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention.mode: unknown key, or one that has no effect here"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 contradicts optim.max_norm=1.0, which needs 1.0"),
        ({"gradient_clipping": True}, "gradient_clipping=true contradicts optim.max_norm=1.0, which needs 1.0"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu=8 contradicts batch.max_seconds"),
        ({"communication_data_type": "bf16"}, 'communication_data_type="bf16" contradicts precision.reduce=fp32'),
        ({"bf16": {"enabled": False}}, "bf16.enabled=false contradicts precision.compute=bf16, which needs true"),
        ({"bf16": True}, "bf16=true: decided by precision.compute=bf16; remove it from this file"),
        ({"bf16": {}, "bfloat16": {}}, "bfloat16 and bf16 are the same section"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true: decided by precision.compute=bf16"),
        ({"data_types": {"param_dtype": "fp32"}}, 'data_types.param_dtype="fp32": decided by precision.compute=bf16'),
        ({"train_batch_size": 64}, "train_batch_size=64: decided by batch.micro_batches"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4: decided by batch.micro_batches"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type="Lamb" contradicts optim.* (one fused AdamW on'),
        ({"optimizer": {"params": {"weight_decay": 0}}}, "optimizer.params.weight_decay=0: decided by optim.*"),
    ],
)  # fmt: skip
def test_unknown_keys_and_contradictions(tmp_path: Path, tree: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, {"zero_optimization": ZERO, **tree}).startswith(message)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 1, "overlap_comm": True}, "overlap_comm=true contradicts stage 1 with accumulation"),
        ({"stage": 2, "compute_grad_norm": False}, "compute_grad_norm=false contradicts optim.max_norm"),
        ({"stage": 2, "zero_quantized_gradients": True}, "zero_quantized_gradients=true contradicts precision.reduce"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights=true contradicts precision.compute"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights=true contrad"),
        ({"stage": 1, "legacy_stage1": True}, f"legacy_stage1=true contradicts DeepSpeed {VERSION}, which needs false"),
        ({"stage": 3, "stage3_module_granularity_threshold": 9}, "stage3_module_granularity_threshold=9 contradicts"),
        ({"stage": 3, "module_granularity_threshold": 9}, "module_granularity_threshold=9 contradicts the backward of"),
        ({"stage": 2, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size=8: needs stage 3, got 2"),
        ({"stage": 2, "cpu_offload_param": True}, "cpu_offload_param=true: needs stage 3, got 2"),
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients=true contradicts how this toolkit moves"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow.topk_ratio=0.1: decided by optim.*"),
        ({"stage": 3, "offload_optimizer": {"ratio": 0.5}}, "offload_optimizer.ratio=0.5 contradicts optim.*"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, 'offload_param.device="cpu": needs stage 3, got 2'),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, 'offload_optimizer.device="nvme": not supported here'),
    ],
)  # fmt: skip
def test_what_deepspeed_would_pass_over_or_stumble_on(tmp_path: Path, zero: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, {"zero_optimization": zero}).startswith(f"zero_optimization.{message}")


REFUSED = {
    "legacy_stage1", "module_granularity_threshold", "round_robin_gradients", "zenflow", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights",
}  # fmt: skip
"""Keys of zero_optimization that must have their defaults, by the test above."""

ITS_DEFAULT_ALONE = {"compute_grad_norm", "ignore_unused_parameters"}
FOR_PINNED_MEMORY = {"cpu_offload_use_pin_memory"}  # deprecated; `pin_memory` has replaced it


@needs_deepspeed
def test_every_key_of_zero_optimization_is_refused_or_used_by_a_test() -> None:
    """Another version of DeepSpeed may have other keys, for each of which this has to be decided."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {field.alias or name: name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    ours = [json.loads((FOLDERS[0] / f"{name}.json").read_text())["zero_optimization"] for name in NAMES]
    used = {fields[key] for zero in (*ours, *ZERO_FILES.values()) for key in zero}
    assert not used & REFUSED
    assert used | REFUSED | ITS_DEFAULT_ALONE | FOR_PINNED_MEMORY == set(fields.values())


def test_the_second_copy_of_hpz_divides_the_processes() -> None:
    document = document_of(config_for("zero3_hpz"))
    for world_size in (1, 3, 8, 64):  # all ranks hold it together where there are fewer than its size
        check_partition_size(document, "my.json", world_size)
    with pytest.raises(
        UserError, match=r"^my\.json: zero_optimization\.zero_hpz_partition_size=8 does not divide 12 pro"
    ):
        check_partition_size(document, "my.json", 12)


def test_gradients_are_sent_in_the_type_that_the_run_says() -> None:
    assert document_of(config_for("zero2", "precision.reduce=bf16"))["communication_data_type"] == "bf16"


@needs_deepspeed
@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"stage": 2, "overlap_com": True}, "zero_optimization.overlap_com: unknown key; did you mean overlap_comm?"),
        ({"stage": 3, "stage3_prefetch": 1}, "zero_optimization.stage3_prefetch: unknown key; did you mean stage3"),
        ({"stage": 2, "reduce_bucket_size": "big"}, 'zero_optimization.reduce_bucket_size="big": Input should be'),
        ({"stage": 2, "offload_optimizer": {"devise": "cpu"}},
         "zero_optimization.offload_optimizer.devise: unknown key; did you mean device?"),
        ({"stage": 2, "offload_optimizer": {"device": "gpu"}}, 'zero_optimization.offload_optimizer.device="gpu": '),
        ({"stage": 2, "offload_optimizer": "cpu"}, 'zero_optimization.offload_optimizer="cpu": Input should be'),
        ({"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}, "refused by DeepSpeed: Cannot"),
        ({"stage": 2, "mics_shard_size": 4}, "zero_optimization.mics_shard_size: unknown key"),
    ],
)  # fmt: skip
def test_deepspeed_checks_its_own_section(tmp_path: Path, tree: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, {"zero_optimization": tree}, by_deepspeed=True).startswith(message)


@needs_deepspeed
@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"comms_logger": {"enable": True}}, "comms_logger.enable: unknown key"),
        ({"tensorboard": {"enabled": "maybe"}}, 'tensorboard.enabled="maybe": Input should be a valid boolean'),
    ],
)
def test_deepspeed_checks_its_other_sections(tmp_path: Path, tree: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, {"zero_optimization": ZERO, **tree}, by_deepspeed=True).startswith(message)


@pytest.mark.parametrize(
    ("name", "message"), [("zero4", "or one of zero1, zero2,"), ("nowhere/zero1.json", "no such file")]
)
def test_a_file_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"engine.deepspeed_config={name}: .*{message}"):
        document_of(config_for(name))


def test_a_path_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "mine_zero3.json").touch()
    with pytest.raises(UserError, match=rf"my_zero3\.json: no such file; did you mean {tmp_path}/mine_zero3\.json\?"):
        document_of(config_for(str(tmp_path / "my_zero3.json")))


def test_another_version_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="0.17.0", get_accelerator=lambda: None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"DeepSpeed 0\.17\.0 is installed, {re.escape(VERSION)} is needed"):
        import_deepspeed(torch.device("cpu"))


def test_the_version_is_the_one_that_is_installed_with_us() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["deepspeed"] == [f"deepspeed=={VERSION}"]


def test_an_installed_package_finds_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the wheel they lie in the package: pyproject.toml puts them there."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"ds_configs": "w2vscale/ds_configs"}
    assert FOLDERS == (ROOT / "ds_configs", ROOT / "w2vscale" / "ds_configs")
    monkeypatch.setattr(module, "FOLDERS", (tmp_path / "nowhere", FOLDERS[0]))
    assert document_of(config_for("zero3"))["zero_optimization"]["stage"] == 3


def test_compiled_blocks_are_not_for_zero3(tmp_path: Path) -> None:
    compiled = ("engine={name: deepspeed, compile: true}",)
    assert merged(tmp_path, {"zero_optimization": {"stage": 2}})
    path = write(tmp_path, {"zero_optimization": {"stage": 3}})
    config = load_config("base", [*compiled, f"engine.deepspeed_config={path}"])
    with pytest.raises(UserError, match=r"engine\.compile=true: ZeRO-3 gathers parameters inside blocks"):
        document_of(config)
