"""DeepSpeed's JSON: what the run fixes is merged in, what contradicts or is unknown is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from w2vscale.cli.app import app
from w2vscale.config import Config, load_config
from w2vscale.engine.deepspeed_config import FOLDERS, deepspeed_config, import_deepspeed, validate_zero
from w2vscale.errors import UserError

NAMES = sorted(path.stem for path in FOLDERS[0].glob("*.json"))


def config_for(path: Path | str, *overrides: str) -> Config:
    return load_config("base", [f"engine.deepspeed_config={path}", *overrides])


def write(folder: Path, tree: Any) -> Path:
    path = folder / "zero.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def test_there_is_a_file_for_each_stage_and_kind_of_offloading() -> None:
    assert NAMES == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_nvme", "zero3_offload"]


@pytest.mark.parametrize("name", NAMES)
def test_our_files_merge_and_deepspeed_accepts_them(name: str) -> None:
    import_deepspeed("cpu")
    merged = deepspeed_config(config_for(name, "optim.max_norm=2.5", "precision.compute=bf16"))
    validate_zero(merged, name)
    assert merged["zero_optimization"]["stage"] == int(name[4])
    assert merged["gradient_clipping"] == 2.5
    assert merged["bf16"] == {"enabled": True}
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert merged["communication_data_type"] == "fp32"
    assert merged["managed_gradient_accumulation"] is False


def test_a_run_that_never_clips_says_so_since_deepspeed_clips_by_default() -> None:
    assert deepspeed_config(config_for("zero1", "optim.max_norm=null"))["gradient_clipping"] == 0.0


def test_auto_and_what_agrees_are_left_to_the_run(tmp_path: Path) -> None:
    tree = {
        "zero_optimization": {"stage": 2}, "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0, "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "steps_per_print": 7,
    }  # fmt: skip
    merged = deepspeed_config(config_for(write(tmp_path, tree)))
    assert merged["bf16"] == {"enabled": True}
    assert merged["steps_per_print"] == 7
    assert not {"fp16", "train_batch_size", "gradient_accumulation_steps"} & merged.keys()


ZERO = {"stage": 2}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ({}, "zero_optimization: expected an object with a stage, got null"),
        ({"zero_optimization": {"stage": "two"}}, 'zero_optimization.stage="two": must be 1, 2 or 3'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true: must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "for stage 0 choose engine.name=ddp"),
        ({"zero_optimization": {}}, "zero_optimization.stage=null: must be 1, 2 or 3"),
        ({"zero_optimization": ZERO, "gradient_cliping": 1.0}, "unknown key; did you mean gradient_clipping?"),
        (
            {"zero_optimization": ZERO, "gradient_clipping": 0.5},
            "gradient_clipping=0.5 contradicts optim.max_norm=1.0, which needs 1.0",
        ),
        (
            {"zero_optimization": ZERO, "bf16": {"enabled": False}},
            "bf16.enabled=false contradicts precision.compute=bf16, which needs true",
        ),
        ({"zero_optimization": ZERO, "fp16": {"enabled": True}}, "decided by the setting precision.compute"),
        ({"zero_optimization": ZERO, "train_batch_size": 64}, "decided by the setting batch.*"),
        ({"zero_optimization": ZERO, "optimizer": {"type": "Adam"}}, "decided by the setting optim.*"),
        (
            {"zero_optimization": ZERO, "gradient_accumulation_steps": 4},
            "gradient_accumulation_steps=4: decided by the setting batch.micro_batches",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, tree: Any, message: str) -> None:
    path = write(tmp_path, tree)
    with pytest.raises(UserError) as caught:
        deepspeed_config(config_for(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 2, "overlap_com": True}, "zero_optimization.overlap_com: unknown key; did you mean overlap_comm?"),
        ({"stage": 2, "reduce_bucket_size": "big"}, "zero_optimization.reduce_bucket_size='big': "),
        ({"stage": 2, "offload_optimizer": {"devise": "cpu"}}, "zero_optimization.offload_optimizer.devise='cpu': "),
    ],
)
def test_deepspeed_checks_its_own_section(tmp_path: Path, zero: dict[str, Any], message: str) -> None:
    import_deepspeed("cpu")
    path = write(tmp_path, {"zero_optimization": zero})
    with pytest.raises(UserError) as caught:
        validate_zero(deepspeed_config(config_for(path)), str(path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"), [("zero4", "nor one of zero1, zero2,"), ("nowhere/zero1.json", "no such file")]
)
def test_a_file_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"engine.deepspeed_config={name}: .*{message}"):
        deepspeed_config(config_for(name))


def test_the_command_line_prints_the_merged_json() -> None:
    result = CliRunner().invoke(app, ["config", "show", "base", "engine.deepspeed_config=zero3", "--deepspeed"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == deepspeed_config(config_for("zero3"))
