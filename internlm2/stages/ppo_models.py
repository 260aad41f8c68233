"""PPO's four models: actor and critic in training, reference and reward model frozen, and the sampler beside them."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import nn

from internlm2.config import Config, ConfigError
from internlm2.config.ppo_memory import check_memory
from internlm2.engine.base import Engine
from internlm2.engine.build import build_engine, place_of_new_model, prepare_device
from internlm2.engine.frozen import FrozenModel
from internlm2.engine.single import DTYPES
from internlm2.generation.build import build_generator, describe_generation
from internlm2.model.adapters import add_adapters, describe, merged_weights
from internlm2.model.scalar import ScalarModel, load_scalar_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.values import Values, stored_values
from internlm2.model.weights import load_weights, open_weights
from internlm2.ops import describe_quantize, quantize_linears_
from internlm2.ops.attention import describe_backend
from internlm2.ops.processor import describe_products
from internlm2.rlhf.frozen import ReferencePolicy, freeze, frozen_tensors, weights_hash
from internlm2.rlhf.rewards import ModelReward, RewardFunction, RuleReward
from internlm2.rlhf.rollout import Sample, Sampler
from internlm2.rlhf.scoring import RewardScorer
from internlm2.run.ranks import from_environment

log = logging.getLogger(__name__)


@dataclass
class Models:
    """What a round works with. `critic` is None for estimators that need none."""

    actor: Engine
    critic: Engine | None
    reference: ReferencePolicy
    reward: RewardFunction
    sampler: Sampler
    plain: CausalLM  # what the sampler reads: the actor itself, or a copy with its adapters merged
    frozen: dict[str, FrozenModel] = field(default_factory=dict)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each frozen model's weights; under adapters the actor's own base is the reference."""
        found = {}
        if self.reference.shared:
            with self.actor.whole() as module:
                found["reference"] = weights_hash(frozen_tensors(module))
        for name in self.frozen:
            with self.reading(name) as module:
                found[name] = weights_hash(frozen_tensors(module))
        return found

    def reading(self, name: str) -> AbstractContextManager[Any]:
        """The frozen model `name` with all its weights on this rank for a while; nothing where there is none."""
        return self.frozen[name].whole() if name in self.frozen else contextlib.nullcontext()

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """The reward function's scores of this rank's answers."""
        with self.reading("reward"):
            return self.reward(samples)


def check_machine(config: Config) -> None:
    """ConfigError with the arithmetic where the models do not fit into what is free here. Loads nothing."""
    assert config.ppo is not None
    if not config.ppo.check_memory:
        return
    device, ranks = prepare_device(config.engine), from_environment()
    if device.type == "cuda":
        free, where = float(torch.cuda.mem_get_info(device)[0]), torch.cuda.get_device_name(device)
    else:
        free, where = psutil.virtual_memory().available / ranks.local_world_size, "this machine"
    models = check_memory(config, free, where, ranks.world_size)
    log.info("memory on each rank before activations: %s", "; ".join(model.sentence() for model in models))


def build_models(
    config: Config, *, policy: Path, reference: Path, reward: Path | RewardFunction | None, vocab_size: int
) -> Models:
    """Load and build everything; `policy`, `reference`: what `open_weights` reads; `reward`: a reward model, or a
    function, or None for the rule that the config names; `vocab_size`: how many ids the policy's tokenizer has.
    """
    ppo = config.ppo
    assert ppo is not None
    device, dtype = prepare_device(config.engine), DTYPES[config.engine.dtype]
    log.info(describe_backend(device, dtype, config.model.head_dim, config.engine.attention))
    log.info(describe_products(device, dtype))
    frozen: dict[str, FrozenModel] = {}
    adapted = config.adapter.kind != "none"
    model, values = _language_model(config, policy, place_of_new_model(config.engine, device, adapted=adapted))
    add_adapters(model, config.adapter, config.seed)
    if adapted:
        log.info("actor %s", describe(model, config.adapter))
    critic = _critic(config, policy, reward if isinstance(reward, Path) else None, device) if ppo.has_critic else None
    actor = build_engine(model, config.engine, config.optim, ppo.iterations * ppo.updates, values)
    shared = adapted and reference == policy
    if shared:
        log.info("reference: the actor with its adapters off")
    base = model if shared else _language_model(config, reference, _place_of_frozen(config, device), frozen=True)[0]
    if not shared:
        frozen["reference"] = _frozen(base, config, "reference", device)
    if isinstance(reward, Path):
        reward_function, frozen["reward"] = _reward_model(config, reward, device)
    else:
        reward_function = RuleReward(str(ppo.reward.rule)) if reward is None else reward
    critic_engine = None
    if critic is not None:
        total = (ppo.critic_warmup + ppo.iterations) * ppo.updates
        critic_engine = build_engine(critic[0], config.engine, ppo.critic.optim, total, critic[1])
    plain = model if config.adapter.kind == "none" else _merged_copy(config, model)
    sampler = _sampler(config, plain, device, vocab_size)
    return Models(
        actor,
        critic_engine,
        ReferencePolicy(base, shared=shared),
        reward_function,
        sampler,
        plain,
        frozen,
    )


@contextlib.contextmanager
def sampling_weights(models: Models, config: Config) -> Iterator[Sampler]:
    """The sampler with the actor's weights as they are now; its copies of them are dropped at the end."""
    with whole(models.actor):
        if models.plain is not models.actor.model:
            merged = merged_weights(cast(CausalLM, models.actor.model), config.adapter)
            load_weights(models.plain, merged, "the merged adapter")
        was_training = models.plain.training
        models.plain.eval()
        models.sampler.refresh()
        yield models.sampler
        models.sampler.release()
        models.plain.train(was_training)


@contextlib.contextmanager
def whole(engine: Engine) -> Iterator[Any]:
    """The engine's model with all its weights on this rank, in eval mode and without gradients."""
    with engine.whole(), torch.no_grad():
        was_training = engine.model.training
        engine.model.eval()
        yield engine.model
        engine.model.train(was_training)


def _language_model(
    config: Config, source: Path, device: torch.device, *, frozen: bool = False
) -> tuple[CausalLM, Values | None]:
    """In fp32, or in the training dtype where it is frozen; on "meta" its weights come in pieces."""
    weights = open_weights(source)
    model = CausalLM.from_config(
        config.model,
        device=device,
        dtype=DTYPES[config.engine.dtype] if frozen else torch.float32,
        attention=config.engine.attention,
        recompute=config.engine.recompute,
        seed=None,
    )
    if device.type == "meta":
        return model, stored_values(model, weights, str(source))
    load_weights(model, weights, str(source))
    return model, None


def _critic(config: Config, policy: Path, reward: Path | None, device: torch.device) -> tuple[nn.Module, Values | None]:
    """The reward model's backbone with a new head (report 4.2.3), or the policy's; and, on "meta", its weights."""
    ppo = config.ppo
    assert ppo is not None
    if ppo.critic.init == "reward" and reward is None:
        raise ConfigError("ppo.critic.init=reward needs a reward model; this run's reward is a function: use policy.")
    source = reward if ppo.critic.init == "reward" and reward is not None else policy
    adapted, values = config.adapter.kind != "none", None
    critic = ScalarModel.from_config(
        config.model,
        device=place_of_new_model(config.engine, device, adapted=adapted),
        attention=config.engine.attention,
        recompute=config.engine.recompute,
        seed=None,
    )
    if next(critic.parameters()).is_meta:
        values = stored_values(critic, open_weights(source), str(source), config.seed)
    else:
        load_scalar_weights(critic, open_weights(source), str(source), head_seed=config.seed)
    if adapted:
        add_adapters(cast(Any, critic), config.adapter, config.seed + 1)
        critic.v_head.weight.requires_grad_(True)
    log.info("critic from %s, with a new head", source)
    return critic, values


def _place_of_frozen(config: Config, device: torch.device) -> torch.device:
    return torch.device("cpu") if config.frozen.shard and config.engine.name != "single" else device


def _frozen(model: nn.Module, config: Config, name: str, device: torch.device) -> FrozenModel:
    """In the training dtype, or quantized; whole on every rank, or spread over them."""
    freeze(model.to(DTYPES[config.engine.dtype]))
    quantize_linears_(model, config.frozen.quantize)
    frozen = FrozenModel(model, config.engine, device, sharded=config.frozen.shard)
    where = "sharded over the ranks" if frozen.sharded else describe_quantize(config.frozen.quantize, device)
    log.info("%s: frozen, %s", name, where)
    return frozen


def _reward_model(config: Config, source: Path, device: torch.device) -> tuple[RewardFunction, FrozenModel]:
    """The conditional reward model, with its own tokenizer and conditions."""
    assert config.ppo is not None
    scorer = RewardScorer.load(
        source,
        device=_place_of_frozen(config, device),
        dtype=DTYPES[config.engine.dtype],
        attention=config.engine.attention,
        batch_tokens=config.ppo.micro_batch_tokens,
    )
    log.info("reward model from %s", source)
    reward = ModelReward(scorer, config.ppo.reward.system_turn)
    return reward, _frozen(scorer.model, config, "reward model", device)


def _merged_copy(config: Config, model: CausalLM) -> CausalLM:
    weight = model.model.norm.weight
    plain = CausalLM.from_config(config.model, device=weight.device, dtype=weight.dtype, seed=None)
    load_weights(plain, merged_weights(model, config.adapter), "the merged adapter")
    return plain


def _sampler(config: Config, plain: CausalLM, device: torch.device, vocab_size: int) -> Sampler:
    assert config.ppo is not None
    if config.ppo.rollout.engine == "vllm":
        from internlm2.rlhf.vllm_sampler import VLLMSampler

        rollout = config.ppo.rollout
        return VLLMSampler(plain, rollout.max_prompt_tokens + rollout.max_new_tokens, vocab_size)
    log.info(describe_generation(config.generation, device))
    return build_generator(plain, config.generation, vocab_size)
