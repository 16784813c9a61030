"""DeepSpeed files that use keys which those in ds_configs/ leave alone. Each key is in one of them, with another value
than DeepSpeed's own default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL_BUCKETS = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
PARTITIONED = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""ZeRO-3 that gathers every parameter for its use alone. With the files of ds_configs/ a micro model stays gathered."""

HPZ = {**PARTITIONED, "zero_hpz_partition_size": 2}
ON_THE_HOST = {"device": "cpu", "pin_memory": False}

ZERO_FILES: dict[str, dict[str, Any]] = {
    "zero1_apart": {"stage": 1, "reduce_scatter": False, "contiguous_gradients": False, "parameter_alignment": True},
    "zero1_small": {"stage": 1, "use_multi_rank_bucket_allreduce": False, **SMALL_BUCKETS},
    "zero2_apart": {
        "stage": 2, "reduce_scatter": False, "allgather_partitions": False, "contiguous_gradients": False,
        "parameter_alignment": True, "load_from_fp32_weights": False, "elastic_checkpoint": True,
    },
    "zero2_small": {
        "stage": 2, "use_multi_rank_bucket_allreduce": False, "overlap_comm": True, "parameter_alignment": True,
        **SMALL_BUCKETS,
    },
    "zero2_host": {
        "stage": 2,
        "offload_optimizer": {
            **ON_THE_HOST, "buffer_count": 2, "pipeline_read": True, "pipeline_write": True, "fast_init": True,
            "cpuadam_cores_perc": 0.5,
        },
    },
    "zero2_deprecated": {"stage": 2, "cpu_offload": True},
    "zero3_partitioned": PARTITIONED,
    "zero3_apart": {
        **PARTITIONED, "contiguous_gradients": False, "overlap_comm": False, "sub_group_size": 2000,
        "memory_efficient_linear": False, "override_module_apply": False, "pipeline_loading_checkpoint": True,
        "save_muon_momentum_buffer_in_memory": True, "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero3_reducing": {
        **PARTITIONED, "stage3_use_all_reduce_for_fetch_params": True, "enable_sanity_checks": True,
        "log_trace_cache_warnings": True, "stage3_max_live_parameters": 1000,
        "reduce_bucket_size": 1000,
    },
    "zero3_persistent": {
        **PARTITIONED, "stage3_param_persistence_threshold": 500, "stage3_model_persistence_threshold": 1000,
        "stage3_prefetch_bucket_size": 5000,
        "leaf_module": {"classes": ["TransformerBlock"]},
    },
    "zero3_deprecated": {
        **PARTITIONED, "stage3_allgather_sequential": True, "cpu_offload_param": True,
        "stage3_gather_fp16_weights_on_model_save": True,
    },
    "hpz": HPZ,
    "hpz_persistent": {**HPZ, "stage3_param_persistence_threshold": 500},
    "hpz_host": {**HPZ, "offload_optimizer": ON_THE_HOST, "offload_param": ON_THE_HOST},
    "hpz_sequential": {**HPZ, "stage3_allgather_sequential": True, "sub_group_size": 2000},
}  # fmt: skip


def write_zero_file(folder: Path, name: str) -> str:
    """Write one of them, and return the setting that chooses it."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"zero_optimization": ZERO_FILES[name]}))
    return f"engine={{name: deepspeed, deepspeed_config: {path}}}"
