"""DeepSpeed itself, and its JSON: a file of ds_configs/ merged with what the run's own settings fix."""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from w2vscale.config import Config
from w2vscale.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (_PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")
"""Of a checkout, and of an installed package."""

_FREE = {
    "aio", "comms_logger", "compile", "csv_monitor", "disable_allgather", "dump_state", "flops_profiler", "log_level",
    "memory_breakdown", "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown", "wandb",
    "zero_optimization",
}  # fmt: skip
"""Top-level keys that are DeepSpeed's alone."""

_OURS = {
    "activation_checkpointing": "engine.activation_checkpointing",
    "fp16": "precision.compute",
    "amp": "precision.compute",
    "torch_autocast": "precision.compute",
    "gradient_accumulation_steps": "batch.micro_batches",
    "optimizer": "optim.*",
    "scheduler": "schedule.*",
    "train_batch_size": "batch.*",
    "elasticity": "batch.*",
}
"""Top-level keys that a setting of the run stands for."""


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The JSON that DeepSpeed is given: the file's keys, and those that the run fixes.

    A value "auto" leaves a key to the run.

    Raises:
        UserError: the file is missing or not valid, or one of its keys is unknown or contradicts a setting.
    """
    path = _find(config.engine.deepspeed_config)
    tree = _read(path)
    _check_zero(tree.get("zero_optimization"), path)
    fixed = _fixed(config)
    merged = {key: value for key, value in tree.items() if value != "auto"}
    for key, value in _leaves(tree):
        setting = next((ours for name, ours in _OURS.items() if key == name or key.startswith(f"{name}.")), None)
        top = key.partition(".")[0]
        if value == "auto":
            continue
        if setting is not None:
            if key.endswith(".enabled") and value is False:
                continue
            raise UserError(f"{path}: {key}={json.dumps(value)}: decided by the setting {setting}; remove it there")
        if key in fixed and value != fixed[key][0]:
            ours, source = fixed[key]
            raise UserError(f"{path}: {key}={json.dumps(value)} contradicts {source}, which needs {json.dumps(ours)}")
        if top not in _FREE and key not in fixed:
            known = [*_FREE, *_OURS, *fixed]
            raise UserError(f"{path}: {key}: unknown key{_nearest(top, known)}")
    for key, (value, _) in fixed.items():
        _set(merged, key, value)
    for key in _OURS:
        merged.pop(key, None)
    return merged


def import_deepspeed(device_type: str) -> Any:
    """The package, told about this process.

    Raises:
        UserError: it is not installed.
    """
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_RANK", "0")
    # It announces itself at import, on every rank.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(
            f"engine.name=deepspeed: DeepSpeed cannot be imported ({error}); pip install 'w2vscale[deepspeed]'"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Of collectives that it calls by their former names, on every rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # An operator for inference, which it would compile on CPUs here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def validate_zero(tree: Mapping[str, Any], path: str) -> None:
    """Have DeepSpeed, imported before, check the section zero_optimization.

    Raises:
        UserError: a key is unknown or a value is not valid; names it.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    zero = tree["zero_optimization"]
    names = {
        str(name) for field, info in DeepSpeedZeroConfig.model_fields.items() for name in (field, info.alias) if name
    }
    for key in zero:
        if key not in names:
            raise UserError(f"{path}: zero_optimization.{key}: unknown key{_nearest(key, sorted(names))}")
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: zero_optimization.{key}={first['input']!r}: {first['msg']}") from None


def _fixed(config: Config) -> dict[str, tuple[Any, str]]:
    """Keys with the value that the run needs, and what of the run needs it."""
    max_norm = config.optim.max_norm
    bf16 = config.precision.compute == "bf16"
    reduction = "this toolkit's fp32 reduction of gradients"
    accumulation = "this toolkit's own accumulation (batch.micro_batches)"
    return {
        "train_micro_batch_size_per_gpu": (1, "batch.max_seconds (a forward is one sample to DeepSpeed)"),
        "managed_gradient_accumulation": (False, accumulation),
        "gradient_clipping": (max_norm or 0.0, f"optim.max_norm={'null' if max_norm is None else max_norm}"),
        "bf16.enabled": (bf16, f"precision.compute={config.precision.compute}"),
        "communication_data_type": ("fp32", reduction),
        "data_types.grad_accum_dtype": ("fp32", reduction),
        "gradient_allreduce_op": ("mean", accumulation),
        "zero_force_ds_cpu_optimizer": (False, "optim.* (one fused AdamW on every engine)"),
    }


def _find(name: str) -> Path:
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise UserError(f"engine.deepspeed_config={name}: no such file")
        return Path(name)
    for folder in FOLDERS:
        if (path := folder / f"{name}.json").is_file():
            return path
    names = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.json")})
    raise UserError(f"engine.deepspeed_config={name}: neither a path that ends in .json nor one of {', '.join(names)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected an object with a section zero_optimization, got a {type(tree).__name__}")
    return tree


def _check_zero(zero: object, path: Path) -> None:
    if not isinstance(zero, dict):
        raise UserError(f"{path}: zero_optimization: expected an object with a stage, got {json.dumps(zero)}")
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        hint = "; for stage 0 choose engine.name=ddp" if stage == 0 and not isinstance(stage, bool) else ""
        raise UserError(f"{path}: zero_optimization.stage={json.dumps(stage)}: must be 1, 2 or 3{hint}")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything outside zero_optimization that is not an object."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            if key != "zero_optimization" or prefix:
                yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        tree[section] = dict(tree.get(section, {}))
        tree = tree[section]
    tree[leaf] = value


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
