"""One typed tree of settings: presets and YAML in, `section.key=value` overrides, resolved YAML out."""

from w2vscale.config.load import dump_config, in_yaml, load_config, objective_named, parse_section, settings_of
from w2vscale.config.running import (
    CheckpointConfig,
    EngineConfig,
    HealthConfig,
    LoggingConfig,
    PrecisionConfig,
    TrainerConfig,
    WatchdogConfig,
)
from w2vscale.config.section import Section, architecture, architecture_of
from w2vscale.config.sources import preset_names
from w2vscale.config.tree import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParameterGroupConfig,
    RegularizationConfig,
    ScheduleConfig,
)
from w2vscale.config.yaml_1_2 import load_yaml
