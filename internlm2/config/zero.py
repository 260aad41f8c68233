"""Keys of the engines over many ranks, and the rules between them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import MISSING

from internlm2.config.errors import ConfigError
from internlm2.config.keys import key

if TYPE_CHECKING:
    from internlm2.config.generation import FrozenConfig
    from internlm2.config.schema import Config, EngineConfig, ModelConfig

ENGINES = ("single", "zero1", "zero2", "zero3")


@dataclass
class ZeroConfig:
    """DeepSpeed's ZeRO: what is offloaded, how far it is sharded, and the sizes of its messages (in elements)."""

    offload: str = key(choices=("none", "optimizer", "parameters"))
    shard_group: int | None = key(minimum=1)
    overlap: bool = MISSING
    reduce_dtype: str = key(choices=("fp32", "bf16"))
    reduce_bucket: int = key(minimum=1)
    gather_bucket: int = key(minimum=2)
    live_parameters: int = key(minimum=1)
    persistent_parameters: int = key(minimum=0)


def check_engine(engine: "EngineConfig", model: "ModelConfig", frozen: "FrozenConfig") -> None:
    """Raise ConfigError for engine keys that do not fit each other or the model."""
    degree = engine.sequence_parallel
    if model.kv_heads % degree:
        good = [n for n in range(1, model.kv_heads + 1) if model.kv_heads % n == 0]
        raise ConfigError(
            f"engine.sequence_parallel={degree} must divide model.kv_heads={model.kv_heads}: use {_listed(good)}."
        )
    if engine.name == "single" and degree > 1:
        raise ConfigError(
            f"engine.sequence_parallel={degree} needs several ranks, but engine=single is one: use engine=zero1."
        )
    if engine.name == "single" and engine.zero.offload != "none":
        raise ConfigError(f"engine.zero.offload={engine.zero.offload} belongs to engine=zero1, zero2 or zero3.")
    if engine.zero.offload == "parameters" and engine.name != "zero3":
        raise ConfigError(
            f"engine.zero.offload=parameters needs engine=zero3, which alone shards the parameters. "
            f"engine={engine.name} can offload the optimizer: engine.zero.offload=optimizer."
        )
    if frozen.shard and (engine.name != "zero3" or frozen.quantize != "none"):
        raise ConfigError(
            f"frozen.shard=true needs engine=zero3 and frozen.quantize=none, not engine={engine.name} and "
            f"frozen.quantize={frozen.quantize}."
        )
    if engine.zero.gather_bucket % 2:
        raise ConfigError(f"engine.zero.gather_bucket={engine.zero.gather_bucket} must be even.")


def check_ranks(config: "Config", world_size: int) -> None:
    """Raise ConfigError where the number of ranks does not fit the engine or the batch; checked once it is known."""
    engine, rows_per_step = config.engine, config.train.rows_per_step
    if engine.name == "single" and world_size > 1:
        raise ConfigError(
            f"engine=single is one process, but the launcher started {world_size}: use engine=zero1, zero2 or zero3."
        )
    degree, group = engine.sequence_parallel, engine.zero.shard_group
    if world_size % degree:
        good = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigError(f"engine.sequence_parallel={degree} must divide the {world_size} ranks: use {_listed(good)}.")
    if group is not None and world_size % group:
        good = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigError(f"engine.zero.shard_group={group} must divide the {world_size} ranks: use {_listed(good)}.")
    if config.stage.kind in ("pretrain", "sft") and rows_per_step < world_size // degree:
        raise ConfigError(
            f"train.batch_tokens gives {rows_per_step} rows of train.seq_len a step, fewer than the "
            f"{world_size // degree} ranks that share them: raise train.batch_tokens, start fewer ranks, or let "
            "several work on one row (engine.sequence_parallel)."
        )


def _listed(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
