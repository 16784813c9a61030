"""The DeepSpeed JSON configuration: a file in ds_configs/, merged with the keys that the settings of the run fix."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from w2vscale.config import EngineConfig, OptimConfig, PrecisionConfig
from w2vscale.config.load import keys_beside
from w2vscale.config.sources import nearest
from w2vscale.errors import UserError
from w2vscale.files import nearest_path

VERSION = "0.19.8"
"""Required version, also pinned in pyproject.toml: importing and exporting state uses private names of DeepSpeed."""

_PACKAGE = Path(__file__).resolve().parents[2]
FOLDERS = (_PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")
"""Folders with named configurations: in a checkout and in an installed package."""

_FREE = {
    "aio", "comms_logger", "csv_monitor", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print",
    "tensorboard", "timers", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer", "zero_optimization",
}  # fmt: skip
"""Top-level keys that the file may set freely. Others must be checked, because DeepSpeed ignores unknown keys."""

GRANULARITY = ("stage3_module_granularity_threshold", "module_granularity_threshold")
"""Two names of one key."""

_SWITCHED = ("amp", "elasticity", "fp16", "torch_autocast")
"""Sections that have no effect unless their key `enabled` is true."""


def deepspeed_config(config: EngineConfig, optim: OptimConfig, precision: PrecisionConfig) -> dict[str, Any]:
    """Return the DeepSpeed configuration: the keys of the file and those that the run fixes.

    A key with the value "auto", at any depth, is dropped: the run sets it, or the DeepSpeed default applies.

    Raises UserError if the file is missing or invalid, or a key in it is unknown or contradicts a setting.
    """
    path = _find(config.deepspeed_config)
    tree = _read(path)
    stage = _checked_stage(tree.get("zero_optimization"), path)
    if config.compile is True and stage == 3:
        raise UserError(
            f"{path}: engine.compile=true: ZeRO-3 gathers parameters inside blocks, which then cannot be compiled; "
            "choose engine.name=fsdp, or zero2"
        )
    fixed, decided = _fixed(optim, precision), _decided(config, precision)
    needed = fixed | _implied(stage)
    for key, value in _leaves(tree):
        given = f"{path}: {key}={json.dumps(value)}"
        top = key.partition(".")[0]
        if key in needed:
            wanted, source = needed[key]
            if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
                raise UserError(f"{given} contradicts {source}, which needs {json.dumps(wanted)}")
        elif setting := next((decided[name] for name in decided if f"{key}.".startswith(f"{name}.")), None):
            if not (value is None or value is False or value == {}):
                raise UserError(f"{given}: decided by {setting}; remove it from this file")
        elif top not in _FREE:
            hint = nearest(top, [*_FREE, *fixed, *decided])
            raise UserError(f"{path}: {key}: unknown key, or one that has no effect here{hint}")
    merged = {key: value for key, value in tree.items() if key in _FREE}
    for key, (value, _) in fixed.items():
        section, _, leaf = key.rpartition(".")
        (merged.setdefault(section, {}) if section else merged)[leaf] = value
    return merged


def import_deepspeed(device: torch.device) -> Any:
    """Import the deepspeed package. UserError if it is not installed, or not in the required version."""
    try:
        with environment_for(device):
            deepspeed = importlib.import_module("deepspeed")
            deepspeed.get_accelerator()
    except ImportError as error:
        raise UserError(
            f"engine.name=deepspeed: DeepSpeed cannot be imported ({error}); pip install 'w2vscale[deepspeed]'"
        ) from None
    if (version := deepspeed.__version__.partition("+")[0]) != VERSION:
        raise UserError(
            f"engine.name=deepspeed: DeepSpeed {version} is installed, {VERSION} is needed; "
            "pip install 'w2vscale[deepspeed]'"
        )
    # Otherwise DeepSpeed runs a compiler to see which operators it could build, and on a CPU builds one for inference.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


@contextmanager
def environment_for(device: torch.device) -> Iterator[None]:
    """Set the environment variables that DeepSpeed reads at import, when it builds an engine, and in every forward.

    They have their previous values again when the block ends.
    """
    if device.type == "cpu":
        defaults = {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "LOCAL_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "1")}
        wanted = {name: value for name, value in defaults.items() if name not in os.environ}
    else:
        # DeepSpeed takes it for the index of the GPU, which it is not if this process sees only one.
        wanted = {"LOCAL_RANK": str(device.index)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def validate_zero(tree: Mapping[str, Any], path: str) -> None:
    """Let DeepSpeed validate what `deepspeed_config` returned. Call `import_deepspeed` first.

    Raises UserError if a key is unknown or a value is invalid; the message names it.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**tree["zero_optimization"])
        DeepSpeedConfig(dict(tree))
    except ValidationError as error:
        first = error.errors()[0]
        sections = {"DeepSpeedZeroConfig": ["zero_optimization"], "CommsLoggerConfig": ["comms_logger"]}
        key = ".".join(map(str, [*sections.get(error.title, []), *first["loc"]]))
        if first["type"] == "extra_forbidden":
            zero = error.title == "DeepSpeedZeroConfig"
            problem = f": unknown key{nearest(key, keys_beside(DeepSpeedZeroConfig, first['loc'])) if zero else ''}"
        else:
            given = "" if isinstance(first["input"], BaseModel | dict) else f"={json.dumps(first['input'])}"
            problem = f"{given}: {first['msg']}"
        raise UserError(f"{path}: {key}{problem}") from None
    except Exception as error:
        # DeepSpeed reports invalid values by assertions, type errors and its own exceptions.
        raise UserError(f"{path}: refused by DeepSpeed: {(str(error) or repr(error)).splitlines()[0]}") from error


def check_partition_size(tree: Mapping[str, Any], path: str, world_size: int) -> None:
    """Raise a UserError if the number of ranks with a second copy of the parameters (hpZ) does not divide all ranks."""
    size = int(tree["zero_optimization"].get("zero_hpz_partition_size", 1))
    if size > 1 and world_size % min(size, world_size):  # DeepSpeed takes all ranks where there are fewer
        raise UserError(
            f"{path}: zero_optimization.zero_hpz_partition_size={size} does not divide {world_size} processes; set it "
            "to the number of processes per machine"
        )


_FP32_GRADIENTS = "this toolkit's fp32 accumulation of gradients"
_ACCUMULATION = "this toolkit's own accumulation (batch.micro_batches)"
_OPTIMIZER = "optim.* (one fused AdamW on every engine)"


def _fixed(optim: OptimConfig, precision: PrecisionConfig) -> dict[str, tuple[Any, str]]:
    """Return the keys that the run sets: for each, the value and the setting that it comes from."""
    max_norm = optim.max_norm
    return {
        "train_micro_batch_size_per_gpu": (1, "batch.max_seconds (a forward is one sample to DeepSpeed)"),
        "managed_gradient_accumulation": (False, _ACCUMULATION),
        "gradient_clipping": (max_norm or 0.0, f"optim.max_norm={'null' if max_norm is None else max_norm}"),
        "bf16.enabled": (precision.compute == "bf16", f"precision.compute={precision.compute}"),
        "communication_data_type": (precision.reduce, f"precision.reduce={precision.reduce}"),
        "data_types.grad_accum_dtype": ("fp32", _FP32_GRADIENTS),
        "gradient_allreduce_op": ("mean", _ACCUMULATION),
        "gradient_predivide_factor": (1.0, _ACCUMULATION),
        "prescale_gradients": (False, _ACCUMULATION),
        "zero_force_ds_cpu_optimizer": (False, _OPTIMIZER),
    }


def _implied(stage: int) -> dict[str, tuple[Any, str]]:
    """Return the keys that may be omitted, but must have this value if given, and the setting that requires it."""
    keys: dict[str, tuple[Any, str]] = {
        "legacy_stage1": (False, f"DeepSpeed {VERSION}"),
        "compute_grad_norm": (True, "optim.max_norm and the metric grad_norm"),
        "ignore_unused_parameters": (True, "regularization.layerdrop"),
        "offload_optimizer.ratio": (1.0, _OPTIMIZER),
        "offload_optimizer.super_offload": (False, _OPTIMIZER),
        # With it, ZeRO orders parameters differently from `import_state`, which would silently load wrong values.
        "round_robin_gradients": (False, "how this toolkit moves state in and out of ZeRO"),
        "zero_quantized_gradients": (False, "precision.reduce (fp32 or bf16)"),
        "zero_quantized_weights": (False, "precision.compute"),
        "zero_quantized_nontrainable_weights": (False, "precision.compute"),
        # With it, the gradient of a parameter arrives when its module has been freed, and the backward fails.
        **dict.fromkeys(GRANULARITY, (0, "the backward of these models")),
    }
    if stage == 1:
        keys["overlap_comm"] = (False, "stage 1 with accumulation by batch.micro_batches")
    return {f"zero_optimization.{key}": needed for key, needed in keys.items()} | {
        "optimizer.type": ("AdamW", _OPTIMIZER)
    }


def _decided(config: EngineConfig, precision: PrecisionConfig) -> dict[str, str]:
    """Return the keys and sections that the file must not set, and the setting of the run that replaces each."""
    types = ("amp", "bf16", "data_types", "fp16", "torch_autocast")
    return {
        "activation_checkpointing": f"engine.activation_checkpointing={config.activation_checkpointing}",
        "scheduler": "schedule.kind",
        **dict.fromkeys(("optimizer", "zero_optimization.zenflow"), "optim.*"),
        **dict.fromkeys(("elasticity", "gradient_accumulation_steps", "train_batch_size"), "batch.micro_batches"),
        **dict.fromkeys(types, f"precision.compute={precision.compute}"),
    }


def _find(name: str) -> Path:
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise UserError(f"engine.deepspeed_config={name}: no such file{nearest_path(name)}")
        return Path(name)
    for folder in FOLDERS:
        if (path := folder / f"{name}.json").is_file():
            return path
    names = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.json")})
    raise UserError(f"engine.deepspeed_config={name}: must be a path that ends in .json or one of {', '.join(names)}")


def _read(path: Path) -> dict[str, Any]:
    """Read the keys of the file, without disabled sections and "auto" values."""
    try:
        tree = json.loads(path.read_text(), object_pairs_hook=_without_auto)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected an object with a section zero_optimization, got a {type(tree).__name__}")
    if "bfloat16" in tree and "bf16" in tree:
        raise UserError(f"{path}: bfloat16 and bf16 are the same section")
    tree = {"bf16" if name == "bfloat16" else name: value for name, value in tree.items()}
    off = [name for name in _SWITCHED if isinstance(tree.get(name), dict) and not tree[name].get("enabled")]
    return {name: value for name, value in tree.items() if name not in off}


def _without_auto(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object without the keys whose value is "auto". A key that occurs twice is a ValueError."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    return {key: value for key, value in pairs if value != "auto"}


def _checked_stage(zero: object, path: Path) -> int:
    """Return the ZeRO stage, or raise a UserError if it or a device for offloading is missing or not supported."""
    if not isinstance(zero, dict):
        raise UserError(f"{path}: zero_optimization: expected an object with a stage, got {json.dumps(zero)}")
    stage = zero.get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        hint = "; for stage 0 choose engine.name=ddp" if type(stage) is int and stage == 0 else ""
        raise UserError(f"{path}: zero_optimization.stage={json.dumps(stage)}: must be 1, 2 or 3{hint}")
    size = zero.get("zero_hpz_partition_size", 1)
    if stage < 3 and size not in (0, 1):
        raise UserError(f"{path}: zero_optimization.zero_hpz_partition_size={size}: needs stage 3, got {stage}")
    if stage < 3 and zero.get("cpu_offload_param"):
        raise UserError(f"{path}: zero_optimization.cpu_offload_param=true: needs stage 3, got {stage}")
    for name in ("offload_optimizer", "offload_param"):
        device = zero[name].get("device") if isinstance(zero.get(name), dict) else None
        if device == "nvme":  # importing and exporting state does not reach tensors on disk
            raise UserError(f'{path}: zero_optimization.{name}.device="nvme": not supported here; choose "cpu"')
        if device == "cpu" and name == "offload_param" and stage < 3:
            raise UserError(f'{path}: zero_optimization.{name}.device="cpu": needs stage 3, got {stage}')
    return stage


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value that is not a non-empty object."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
