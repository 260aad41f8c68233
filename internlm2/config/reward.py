"""The `reward` group: how a reward model is trained (report 4.2.1). Values stand in conf/reward/conditional.yaml."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from internlm2.config.errors import ConfigError
from internlm2.config.keys import key


@dataclass
class BarrierConfig:
    """The penalty that keeps scores inside (-bound, bound)."""

    coefficient: float = key(minimum=0.0)
    bound: float = key(minimum=1e-3)
    eps: float = key(minimum=1e-6)


@dataclass
class RewardConfig:
    """Loss, conditions by domain, and how much of the held-out pairs is judged."""

    loss: str = key(choices=("focal", "plain"))
    focal_gamma: float = key(minimum=0.0)
    focal_detach: bool = MISSING
    margin: float = key(minimum=0.0)
    barrier: BarrierConfig = field(default_factory=BarrierConfig)
    conditional: bool = MISSING
    conditions: dict[str, str] = MISSING
    validation_pairs: int | None = key(minimum=1)


@dataclass
class ConflictConfig:
    """The experiment that trains reward models with and without conditions from the same start."""

    seeds: list[int] = MISSING
    processes: int = key(minimum=1)


def check_reward(reward: RewardConfig | None, seq_len: int, batch_tokens: int) -> None:
    """Rules between the keys of stage=rm. Raises ConfigError."""
    if reward is None:
        raise ConfigError("stage.kind=reward needs the group reward: use reward=conditional or reward=unconditional.")
    if reward.conditional and not reward.conditions:
        raise ConfigError("reward.conditional=true needs reward.conditions, a text for each domain of the data.")
    if reward.barrier.eps >= reward.barrier.bound:
        raise ConfigError(
            f"reward.barrier.eps={reward.barrier.eps} must be far below reward.barrier.bound={reward.barrier.bound}: "
            "use 0.001."
        )
    if batch_tokens < 2 * seq_len:
        raise ConfigError(
            f"train.batch_tokens={batch_tokens} must hold a pair of the greatest length: use at least 2 x "
            f"train.seq_len = {2 * seq_len}."
        )
