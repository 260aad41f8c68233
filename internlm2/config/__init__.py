"""Typed, closed configuration: schema, checks and composition. Nothing here imports torch."""

from internlm2.config.errors import ConfigError
from internlm2.config.generation import FrozenConfig, GenerationConfig
from internlm2.config.reward import BarrierConfig, RewardConfig
from internlm2.config.schema import (
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    LengthBucketConfig,
    ModelConfig,
    OptimConfig,
    RopeScalingConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    ValidateConfig,
    WandbConfig,
)

__all__ = [
    "AdapterConfig",
    "BarrierConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "FrozenConfig",
    "GenerationConfig",
    "LengthBucketConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "RopeScalingConfig",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainConfig",
    "ValidateConfig",
    "WandbConfig",
]
