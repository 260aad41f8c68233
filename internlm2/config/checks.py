"""Checks of a composed config: bounds and choices of single keys, then rules between keys.

Each failure is one sentence that names the keys and a value that works.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from internlm2.config.errors import ConfigError
from internlm2.config.ppo import check_ppo
from internlm2.config.reward import check_reward
from internlm2.config.rounds import check_rounds
from internlm2.config.schema import Config, ModelConfig, OptimConfig
from internlm2.config.zero import check_engine


def check(config: Config) -> None:
    """Raise ConfigError for the first key, or pair of keys, that cannot work."""
    check_keys(config)
    if config.stage.kind == "recipe":
        return
    check_model(config.model)
    check_engine(config.engine, config.model, config.frozen)
    _check_lengths(config)
    _check_schedule(config.optim, "optim")
    if config.stage.kind in ("reward", "conflict"):
        check_reward(config.reward, config.train.seq_len, config.train.batch_tokens)
    if config.stage.kind == "ppo":
        check_ppo(config.ppo, config.prompts, config.model.max_position_embeddings, config.generation.quantize)
        assert config.ppo is not None
        check_rounds(config.rounds)
        _check_schedule(config.ppo.critic.optim, "ppo.critic.optim")
        _check_ppo_engine(config)
    if config.ppo is None or config.ppo.pretrain.coefficient > 0:
        _check_mixture(config)
    _check_tokenizer(config)
    if config.stage.previous is None and config.init_from == "previous":
        raise ConfigError(
            f"init_from=previous: stage {config.stage.name} is the first; give a stage, a directory or null."
        )


def check_keys(config: Any) -> None:
    """Raise ConfigError for the first key of a dataclass that lies outside of its bounds or choices."""
    for key, value, metadata in _annotated_values(config):
        _check_value(key, value, metadata)


def _check_ppo_engine(config: Config) -> None:
    if config.engine.on_nonfinite == "rollback":
        raise ConfigError(
            "engine.on_nonfinite=rollback returns to an older position of a data stream, but PPO's data are its own "
            "answers: use skip or stop."
        )
    if config.engine.sequence_parallel > 1:
        raise ConfigError(
            f"engine.sequence_parallel={config.engine.sequence_parallel}: PPO reads log-probabilities at single "
            "positions of whole rows; use engine.sequence_parallel=1."
        )
    if config.adapter.kind != "none" and config.adapter.dropout > 0:
        raise ConfigError(
            f"adapter.dropout={config.adapter.dropout:g}: with dropout the ratio is not 1 where nothing has changed; "
            "use adapter.dropout=0 in PPO."
        )


def _annotated_values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every leaf that carries bounds or choices, with its dotted key."""
    for item in fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if is_dataclass(value):
            yield from _annotated_values(value, key + ".")
        elif item.metadata:
            yield key, value, dict(item.metadata)
        for name, child in children:
            if is_dataclass(child):
                yield from _annotated_values(child, f"{key}.{name}.")


def _check_value(key: str, value: Any, metadata: dict[str, Any]) -> None:
    if value is None:
        return
    choices, minimum, maximum = metadata.get("choices"), metadata.get("minimum"), metadata.get("maximum")
    if choices and value not in choices:
        raise ConfigError(f"{key}={value} is not one of {', '.join(choices)}.")
    if minimum is not None and not value >= minimum:  # `not >=` also catches NaN
        raise ConfigError(f"{key}={value} must be at least {minimum}.")
    if maximum is not None and not value <= maximum:
        raise ConfigError(f"{key}={value} must be at most {maximum}.")


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError where the shapes of the network do not divide."""
    if model.heads % model.kv_heads:
        good = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        raise ConfigError(
            f"model.kv_heads={model.kv_heads} must divide model.heads={model.heads}: "
            f"use one of {', '.join(map(str, good))}."
        )
    if model.head_dim % 2:
        raise ConfigError(f"model.head_dim={model.head_dim} must be even: RoPE rotates pairs of dimensions.")
    if model.heads * model.head_dim != model.hidden_size:
        raise ConfigError(
            f"model.heads={model.heads} x model.head_dim={model.head_dim} must equal "
            f"model.hidden_size={model.hidden_size}: use model.hidden_size={model.heads * model.head_dim}."
        )


def _check_lengths(config: Config) -> None:
    train, model = config.train, config.model
    if train.seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"train.seq_len={train.seq_len} exceeds model.max_position_embeddings={model.max_position_embeddings}: "
            f"set model.max_position_embeddings={train.seq_len} or shorten train.seq_len."
        )
    forward_tokens = train.seq_len * train.micro_batch
    # Batches of pairs hold as many as fit.
    if config.stage.kind not in ("reward", "conflict") and train.batch_tokens % forward_tokens:
        nearest = max(1, round(train.batch_tokens / forward_tokens)) * forward_tokens
        raise ConfigError(
            f"train.batch_tokens={train.batch_tokens} must be a multiple of train.seq_len x train.micro_batch = "
            f"{forward_tokens}: use train.batch_tokens={nearest}."
        )
    if train.steps is None and train.tokens is None and not train.epochs:
        raise ConfigError("The length of the stage is missing: give train.steps, train.tokens or train.epochs.")


def _check_schedule(optim: OptimConfig, group: str) -> None:
    if optim.schedule_start >= optim.schedule_end:
        raise ConfigError(
            f"{group}.schedule_start={optim.schedule_start} must be below {group}.schedule_end={optim.schedule_end}."
        )
    for key in ("beta1", "beta2"):
        if getattr(optim, key) >= 1.0:
            raise ConfigError(f"{group}.{key}={getattr(optim, key)} must be below 1.")


def _check_mixture(config: Config) -> None:
    data, stage = config.data, config.stage.name
    if stage not in data.weights:
        raise ConfigError(
            f"data={data.name} has no mixture for stage {stage}: add data.weights.{stage}, a weight in tokens for each "
            f"source ({', '.join(data.sources)})."
        )
    weights = data.weights[stage]
    for source, weight in weights.items():
        if source not in data.sources:
            raise ConfigError(
                f"data.weights.{stage}.{source}: no such source; data.sources has {', '.join(data.sources)}."
            )
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"data.weights.{stage}.{source}={weight} must be a finite number of at least 0.")
    if not sum(weights.values()) > 0:
        raise ConfigError(f"data.weights.{stage}: all weights are 0; give at least one source a positive weight.")
    if data.length_buckets and not sum(bucket.weight for bucket in data.length_buckets) > 0:
        raise ConfigError("data.length_buckets: all weights are 0.")


def _check_tokenizer(config: Config) -> None:
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "train":
        if tokenizer.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"data.tokenizer.vocab_size={tokenizer.vocab_size} and model.vocab_size={config.model.vocab_size} "
                f"differ: use data.tokenizer.vocab_size={config.model.vocab_size}."
            )
    elif tokenizer.kind == "inherit" and config.init_from is None:
        raise ConfigError("data.tokenizer.kind=inherit needs init_from, the weights whose tokenizer is inherited.")
