"""Online RLHF with PPO: types, bounds, rules between keys. Values and their sources stand in conf/stage/ppo.yaml."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from internlm2.config.errors import ConfigError
from internlm2.config.keys import key as _key
from internlm2.config.optim import OptimConfig


@dataclass
class PromptSourceConfig:
    """One source of prompts. `path` belongs to kind=jsonl, `count` to the kinds that are made on the spot."""

    kind: str = field(default=MISSING, metadata={"choices": ("jsonl", "arithmetic", "toy", "stdlib")})
    weight: float = field(default=1.0, metadata={"minimum": 0.0})
    path: str | None = None
    domain: str | None = None
    count: int = field(default=100_000, metadata={"minimum": 1})


@dataclass
class PromptsConfig:
    """Prompts to answer, by source; weights count prompts."""

    name: str = MISSING
    sources: dict[str, PromptSourceConfig] = MISSING
    validation_fraction: float = _key(minimum=0.0, maximum=0.5)


@dataclass
class RolloutConfig:
    """How answers are sampled."""

    engine: str = _key(choices=("internlm2", "vllm"))
    temperature: float = _key(minimum=1e-3)
    top_p: float = _key(minimum=1e-6, maximum=1.0)
    top_k: int = _key(minimum=0)
    max_prompt_tokens: int = _key(minimum=1)
    max_new_tokens: int = _key(minimum=1)


@dataclass
class CorrectionConfig:
    """What is done about a sampler whose log-probabilities differ from the trainer's."""

    weights: str = _key(choices=("none", "truncated"))
    sampler: str = _key(choices=("full", "truncated"))
    limit: float = _key(minimum=1.0)
    stop_above: float | None = _key(minimum=0.0)


@dataclass
class KLConfig:
    """The penalty that keeps the policy near the reference."""

    coefficient: float = _key(minimum=0.0)
    place: str = _key(choices=("reward", "loss"))
    estimator: str = _key(choices=("k1", "k2", "k3"))
    target: float | None = _key(minimum=0.0)
    horizon: int = _key(minimum=1)
    exact_rows: int = _key(minimum=0)


@dataclass
class PPORewardConfig:
    """Who judges an answer, and how the score becomes a reward."""

    kind: str = _key(choices=("model", "rule"))
    model: str | None = MISSING
    rule: str | None = MISSING
    system_turn: str = _key(choices=("keep", "drop"))
    normalize: str = _key(choices=("none", "initial", "running"))
    clip: float | None = _key(minimum=0.0)
    missing_end: str = _key(choices=("none", "subtract", "replace"))
    missing_end_value: float = MISSING
    length_buffer: int = _key(minimum=0)
    length_penalty: float = _key(minimum=0.0)


@dataclass
class CriticConfig:
    """The value model: where its backbone comes from, and its own optimizer."""

    init: str = _key(choices=("reward", "policy"))
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class PretrainLossConfig:
    """The language-model loss beside PPO's, on a stream of its own (`data.weights.ppo`)."""

    coefficient: float = _key(minimum=0.0)
    share: float = _key(minimum=0.0)


@dataclass
class PPOValidationConfig:
    """Held-out prompts: how often they are answered, how many of each source, and which checkpoint is exported."""

    every: int | None = _key(minimum=1)
    rows: int = _key(minimum=1)
    select: str = _key(choices=("best", "last"))
    gold: str | None = MISSING


@dataclass
class PPOConfig:
    """One round of online RLHF."""

    iterations: int = _key(minimum=1)
    critic_warmup: int = _key(minimum=0)
    prompts_per_iteration: int = _key(minimum=1)
    samples_per_prompt: int = _key(minimum=1)
    estimator: str = _key(choices=("gae", "grpo", "rloo"))
    gamma: float = _key(minimum=0.0, maximum=1.0)
    gae_lambda: float = _key(minimum=0.0, maximum=1.0)
    whiten: bool = MISSING
    group_scale: bool = MISSING
    clip: float = _key(minimum=0.0)
    dual_clip: float | None = _key(minimum=1.0)
    value_clip: float | None = _key(minimum=0.0)
    entropy_coefficient: float = _key(minimum=0.0)
    epochs: int = _key(minimum=1)
    minibatches: int = _key(minimum=1)
    micro_batch_tokens: int = _key(minimum=1)
    old_logprobs: str = _key(choices=("recomputed", "sampler"))
    keep_rollouts_every: int | None = _key(minimum=1)
    check_memory: bool = MISSING
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    reward: PPORewardConfig = field(default_factory=PPORewardConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    pretrain: PretrainLossConfig = field(default_factory=PretrainLossConfig)
    validation: PPOValidationConfig = field(default_factory=PPOValidationConfig)

    @property
    def rows(self) -> int:
        """Answers in one iteration, over all ranks."""
        return self.prompts_per_iteration * self.samples_per_prompt

    @property
    def updates(self) -> int:
        """Optimizer steps of one iteration."""
        return self.epochs * self.minibatches

    @property
    def has_critic(self) -> bool:
        return self.estimator == "gae"


def check_ppo(
    ppo: PPOConfig | None, prompts: PromptsConfig | None, max_position_embeddings: int, quantize: str
) -> None:
    """Rules between the keys of stage=ppo; `quantize` is that of the sampler. Raises ConfigError."""
    if ppo is None:
        raise ConfigError("stage.kind=ppo needs the group ppo: start from conf/stage/ppo.yaml.")
    if prompts is None or not prompts.sources:
        raise ConfigError(
            "stage.kind=ppo needs prompts to answer: choose prompts=arithmetic or a file in conf/prompts."
        )
    _check_kl(ppo.kl)
    _check_reward(ppo)
    _check_estimator(ppo)
    rollout = ppo.rollout
    if rollout.max_prompt_tokens + rollout.max_new_tokens > max_position_embeddings:
        raise ConfigError(
            f"ppo.rollout.max_prompt_tokens={rollout.max_prompt_tokens} + ppo.rollout.max_new_tokens="
            f"{rollout.max_new_tokens} exceed model.max_position_embeddings={max_position_embeddings}: "
            f"use ppo.rollout.max_new_tokens={max(1, max_position_embeddings - rollout.max_prompt_tokens)}."
        )
    _check_sampler(ppo, quantize)
    if ppo.minibatches > ppo.rows:
        raise ConfigError(
            f"ppo.minibatches={ppo.minibatches} exceeds the {ppo.rows} answers of an iteration "
            f"(ppo.prompts_per_iteration x ppo.samples_per_prompt): use at most {ppo.rows}."
        )
    for name, source in prompts.sources.items():
        if source.kind == "jsonl" and source.path is None:
            raise ConfigError(f"prompts.sources.{name}: kind=jsonl needs path, a file of JSON lines.")


def _check_sampler(ppo: PPOConfig, quantize: str) -> None:
    if quantize != "none" and ppo.correction.weights == "none":
        raise ConfigError(
            f"generation.quantize={quantize} samples from a rounded policy: "
            "set ppo.correction.weights=truncated, which corrects for that."
        )
    plain = ppo.rollout.temperature == 1.0
    if ppo.old_logprobs == "sampler" and not plain:
        raise ConfigError(
            f"ppo.old_logprobs=sampler with ppo.rollout.temperature={ppo.rollout.temperature:g}: the sampler's "
            "untruncated log-probabilities are those of temperature 1. Use ppo.old_logprobs=recomputed."
        )
    if ppo.correction.weights == "truncated" and ppo.correction.sampler == "full" and not plain:
        raise ConfigError(
            f"ppo.correction.sampler=full with ppo.rollout.temperature={ppo.rollout.temperature:g}: the sampler's "
            "untruncated log-probabilities are those of temperature 1. Use ppo.correction.sampler=truncated."
        )
    if ppo.rollout.engine == "vllm" and ppo.correction.sampler == "truncated":
        raise ConfigError(
            "ppo.correction.sampler=truncated needs the probabilities that tokens were drawn with, and "
            "ppo.rollout.engine=vllm gives those of the softmax: use ppo.correction.sampler=full."
        )


def _check_kl(kl: KLConfig) -> None:
    if kl.place == "reward" and kl.estimator != "k1":
        raise ConfigError(
            f"ppo.kl.estimator={kl.estimator} with ppo.kl.place=reward has a wrong policy gradient: as a penalty in "
            "the reward only k1 gives that of KL(policy || reference). Use k1 (it is logged with k3 and exactly)."
        )
    if kl.place == "loss" and kl.estimator != "k2":
        why = "has an expected gradient of zero" if kl.estimator == "k1" else "follows KL(reference || policy) instead"
        raise ConfigError(f"ppo.kl.estimator={kl.estimator} with ppo.kl.place=loss {why}: use k2 there.")


def _check_estimator(ppo: PPOConfig) -> None:
    if ppo.has_critic:
        if ppo.critic.init == "reward" and ppo.reward.kind == "rule":
            raise ConfigError(
                "ppo.critic.init=reward needs a reward model, and ppo.reward.kind=rule has none: use policy."
            )
        return
    if ppo.samples_per_prompt < 2:
        raise ConfigError(
            f"ppo.estimator={ppo.estimator} compares answers to the same prompt: use ppo.samples_per_prompt=4 or so, "
            "or ppo.estimator=gae."
        )
    if ppo.critic_warmup:
        raise ConfigError(f"ppo.estimator={ppo.estimator} has no critic to warm up: use ppo.critic_warmup=0.")


def _check_reward(ppo: PPOConfig) -> None:
    reward = ppo.reward
    if reward.kind == "model" and not reward.model:
        raise ConfigError("ppo.reward.kind=model needs ppo.reward.model: a stage of this run such as rm, or a folder.")
    if reward.kind == "rule" and not reward.rule:
        raise ConfigError("ppo.reward.kind=rule needs ppo.reward.rule, the name of a rule such as final_number.")
    if reward.length_buffer > ppo.rollout.max_new_tokens:
        raise ConfigError(
            f"ppo.reward.length_buffer={reward.length_buffer} exceeds ppo.rollout.max_new_tokens="
            f"{ppo.rollout.max_new_tokens}: every answer would be too long."
        )
