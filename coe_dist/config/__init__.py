"""The one configuration schema: YAML plus dotted overrides -> a frozen, fully validated RunConfig.

Every problem is an InputError of one line: `experts.count: 0 is not allowed; give a whole number from 2 to 4096`.
"""

from coe_dist.config.addresses import holds_secret, is_url
from coe_dist.config.reading import load_config, parse, parse_config, read_yaml
from coe_dist.config.run import RunConfig
from coe_dist.config.sections import (
    AugmentationConfig,
    DataConfig,
    DistillationConfig,
    EarlyExitConfig,
    ExpertsConfig,
    Finite,
    Fraction,
    NetworkConfig,
    NonNegative,
    OptimizerConfig,
    Positive,
    PretrainableConfig,
    ProgressiveConfig,
    RouterConfig,
    Section,
    StagingConfig,
    StorageConfig,
    TrackingConfig,
    TrainingConfig,
    WorkersConfig,
)

__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "DistillationConfig",
    "EarlyExitConfig",
    "ExpertsConfig",
    "Finite",
    "Fraction",
    "NetworkConfig",
    "NonNegative",
    "OptimizerConfig",
    "Positive",
    "PretrainableConfig",
    "ProgressiveConfig",
    "RouterConfig",
    "RunConfig",
    "Section",
    "StagingConfig",
    "StorageConfig",
    "TrackingConfig",
    "TrainingConfig",
    "WorkersConfig",
    "holds_secret",
    "is_url",
    "load_config",
    "parse",
    "parse_config",
    "read_yaml",
]
