"""How models run that are not being trained: while they sample, and where they are frozen."""

from dataclasses import dataclass

from omegaconf import MISSING

from internlm2.config.keys import key

QUANTIZATIONS = ("none", "w8", "w4")


@dataclass
class GenerationConfig:
    """Answers to prompts: a stage's samples, evaluation, PPO's rollouts."""

    quantize: str = key(choices=QUANTIZATIONS)
    max_rows: int = key(minimum=1)
    kv_tokens: int = key(minimum=64)


@dataclass
class FrozenConfig:
    """Models that are only read: PPO's reference and reward models."""

    quantize: str = key(choices=QUANTIZATIONS)
    shard: bool = MISSING
