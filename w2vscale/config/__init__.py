"""One typed tree of settings: presets and YAML in, `section.key=value` overrides, resolved YAML out."""

from w2vscale.config.load import dump_config, load_config, preset_names
from w2vscale.config.tree import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParameterGroupConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainerConfig,
)

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "ParameterGroupConfig",
    "PrecisionConfig",
    "ScheduleConfig",
    "TrainerConfig",
    "dump_config",
    "load_config",
    "preset_names",
]
