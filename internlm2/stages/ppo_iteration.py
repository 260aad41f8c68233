"""One iteration of PPO, phase after phase: answer, score, judge each token, update the critic and then the actor."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from internlm2.config import Config
from internlm2.config.ppo import PPOConfig
from internlm2.data.prompts import PromptStream
from internlm2.data.stream import TokenStream
from internlm2.engine.base import Batch, StepResult
from internlm2.engine.guard import TrainingStopped
from internlm2.generation.parameters import SamplingParams
from internlm2.model.loss import token_kl
from internlm2.model.transformer import CausalLM
from internlm2.rlhf.estimators import (
    generalized_advantages,
    grouped_advantages,
    leave_one_out_advantages,
    moments,
    rows_of_tokens,
    standardize,
    sum_of_answers,
)
from internlm2.rlhf.experience import (
    Experience,
    Packed,
    bounds_of,
    each_token,
    minibatches,
    pack,
    plan,
    policy_batches,
    sequence_tokens,
)
from internlm2.rlhf.kl import KLController, k1
from internlm2.rlhf.losses import importance_weights
from internlm2.rlhf.measure import (
    AnswerNumbers,
    actor_numbers,
    answer_numbers,
    by_domain,
    critic_numbers,
    drift,
    mean_of,
    sampler_logprobs,
    token_spread,
)
from internlm2.rlhf.objective import actor_loss, critic_loss, pretrain_batches
from internlm2.rlhf.rollout import Rollout, as_sample, collect, rollout_seed, take_questions
from internlm2.rlhf.shaping import RunningMoments, shape_scores, token_rewards
from internlm2.stages.ppo_models import Models, sampling_weights, whole
from internlm2.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What an interrupted round needs besides weights and optimizers. All random numbers are functions of the seed and
    these positions, so there is no generator to save.
    """

    iteration: int = 0
    prompt_position: int = 0
    pretrain_position: int = 0
    initial_score: float | None = None  # mean of the first iteration, for ppo.reward.normalize=initial
    moments: RunningMoments = field(default_factory=RunningMoments)
    best: dict[str, float] | None = None  # {"step", "reward"} of the best validation


@dataclass
class Trainer:
    """The parts that an iteration works with."""

    config: Config
    models: Models
    tokenizer: Tokenizer
    prompts: PromptStream
    stream: TokenStream | None  # of the pretraining loss
    controller: KLController
    progress: Progress = field(default_factory=Progress)

    @property
    def ppo(self) -> PPOConfig:
        assert self.config.ppo is not None
        return self.config.ppo

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, of what follows from the data."""
        return self.models.actor.sum_over_data(values)

    def sampling(self, purpose: str, iteration: int, samples: int) -> SamplingParams:
        rollout = self.ppo.rollout
        return SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=rollout.max_new_tokens,
            stop_ids=(self.tokenizer.eos_id, self.tokenizer.special_id("<|im_end|>")),
            seed=rollout_seed(self.config.seed, purpose, iteration),
            n=samples,
        )


class Clock:
    """Seconds of each phase, by the wall or by any other clock."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - started


@dataclass
class Iteration:
    """What one iteration did: metrics that follow from config, seed and data; seconds by phase; its answers."""

    values: dict[str, Any]
    seconds: dict[str, float]
    rollouts: list[Rollout]
    numbers: AnswerNumbers
    tokens: int


def run_iteration(trainer: Trainer) -> Iteration:
    """Answer, score, update; the positions in `trainer.progress` move on."""
    ppo, progress, clock = trainer.ppo, trainer.progress, Clock()
    number = progress.iteration
    questions, position = take_questions(
        trainer.prompts,
        progress.prompt_position,
        ppo.prompts_per_iteration,
        trainer.tokenizer,
        ppo.rollout.max_prompt_tokens,
    )
    actor = trainer.models.actor
    with clock("rollout"), sampling_weights(trainer.models, trainer.config) as sampler:
        params = trainer.sampling("rollout", number, ppo.samples_per_prompt)
        rollouts = collect(sampler, questions[actor.data_rank :: actor.data_ranks], params, trainer.tokenizer)
    with clock("score"):
        experience, numbers, values = make_experience(trainer, rollouts)
    tokens = trainer.total([float(sum(sequence_tokens(rollout) for rollout in rollouts))])[0]
    with clock("train"):
        values |= update(trainer, experience, tokens)
    domains = by_domain(rollouts, numbers, {question.prompt.domain for question in questions}, trainer.total)
    everything = domains.pop("all")
    trainer.controller.update(float(everything["kl"] or 0.0), int(everything["answers"] or 0))
    progress.iteration, progress.prompt_position = number + 1, position
    phase = "critic_warmup" if number < ppo.critic_warmup else "ppo"
    values = {"phase": phase, **everything, **values, "domains": domains}
    values |= {"prompt_position": position, "pretrain_position": progress.pretrain_position, "tokens": int(tokens)}
    return Iteration(values, clock.seconds, rollouts, numbers, int(tokens))


def make_experience(trainer: Trainer, rollouts: list[Rollout]) -> tuple[Experience, AnswerNumbers, dict[str, Any]]:
    """Log-probabilities, values, scores and advantages of the answers: one model after another."""
    ppo, models = trainer.ppo, trainer.models
    bounds, device = bounds_of(rollouts), models.actor.device
    packs = plan([sequence_tokens(rollout) for rollout in rollouts], ppo.micro_batch_tokens)
    old, reference, values = policy_logprobs(trainer, rollouts, packs)
    critic = torch.zeros_like(old)
    if models.critic is not None:
        with whole(models.critic) as model:
            (critic,) = each_token(lambda row: [state_values(model, row)], rollouts, packs, device)
    scores = torch.tensor(models.score([as_sample(rollout) for rollout in rollouts]), dtype=torch.float64)
    shaped = shape(trainer, scores, rollouts)
    numbers = answer_numbers(scores, shaped, old, reference, bounds)
    penalty = trainer.controller.coefficient * k1(old, reference) if ppo.kl.place == "reward" else torch.zeros_like(old)
    rewards = token_rewards(shaped.to(old.dtype), penalty, bounds)
    advantages, returns = estimate(ppo, rewards, critic, bounds, rollouts)
    values["advantage"], values["advantage_std"] = token_spread(advantages, trainer.total)
    if ppo.whiten:
        advantages = standardize(advantages, trainer.total(moments(advantages)))
    weights = torch.ones_like(old)
    if ppo.correction.weights == "truncated":
        drawn = sampler_logprobs(rollouts, tempered=ppo.correction.sampler == "truncated")
        weights = importance_weights(old, drawn, ppo.correction.limit)
        values["importance_weight"] = token_spread(weights, trainer.total)[0]
    experience = Experience(rollouts, bounds, old, reference, critic, advantages, returns, weights)
    if models.critic is not None:
        values |= critic_numbers(experience, trainer.total)
    return experience, numbers, values | {"kl_coefficient": trainer.controller.coefficient}


def policy_logprobs(
    trainer: Trainer, rollouts: Sequence[Rollout], packs: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(policy's, reference's log-probabilities [A], what the two say about sampler, entropy and exact KL)."""
    ppo, models, device = trainer.ppo, trainer.models, trainer.models.actor.device
    temperature = ppo.rollout.temperature
    found: dict[str, Any] = {}
    with whole(models.actor) as model, models.reading("reference"):
        if ppo.old_logprobs == "recomputed":
            old, entropy = each_token(lambda row: token_numbers(model, row, temperature), rollouts, packs, device)
            found["entropy"] = token_spread(entropy, trainer.total)[0]
            found["drift"] = check_drift(trainer, old, rollouts)
        else:
            old = sampler_logprobs(rollouts, tempered=False)
        with models.reference.model(model) as base:
            reference, _ = each_token(lambda row: token_numbers(base, row, temperature), rollouts, packs, device)
        if ppo.kl.exact_rows:
            found["kl_exact"] = exact_kl(trainer, model, rollouts[: ppo.kl.exact_rows])
    return old, reference, found


def token_numbers(model: CausalLM, row: Packed, temperature: float) -> Sequence[Tensor]:
    """(log-probability of each action, entropy before it)."""
    return model.logprobs(row.ids, row.cu_seqlens, row.max_seqlen, row.at, row.labels, temperature)


def state_values(critic: Any, row: Packed) -> Tensor:
    """V of the state before each action."""
    return critic(row.ids, row.cu_seqlens, row.max_seqlen, row.at)


def check_drift(trainer: Trainer, old: Tensor, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Sampler against trainer; raises TrainingStopped beyond ppo.correction.stop_above."""
    tempered = trainer.ppo.rollout.temperature != 1.0
    found, limit = drift(old, rollouts, tempered, trainer.total), trainer.ppo.correction.stop_above
    if limit is not None and not found["kl"] <= limit:
        raise TrainingStopped(
            f"Iteration {trainer.progress.iteration + 1}: sampler and trainer differ by {found['kl']:.3g} nats a "
            f"token, more than ppo.correction.stop_above={limit}: what is sampled is not the policy that is trained. "
            "Nothing was updated by it."
        )
    return found


def exact_kl(trainer: Trainer, model: CausalLM, rollouts: Sequence[Rollout]) -> float | None:
    """KL over the whole vocabulary at the states of a few answers, nats an answer."""
    temperature, total = trainer.ppo.rollout.temperature, 0.0
    for chosen in plan([sequence_tokens(rollout) for rollout in rollouts], trainer.ppo.micro_batch_tokens):
        row = pack([rollouts[place] for place in chosen]).to(trainer.models.actor.device)
        mine = model.model(row.ids, row.cu_seqlens, row.max_seqlen, row.at)
        own = model.output_weight
        with trainer.models.reference.model(model) as base:
            theirs = base.model(row.ids, row.cu_seqlens, row.max_seqlen, row.at)
            total += token_kl(mine, own, theirs, base.output_weight, temperature=temperature).double().sum().item()
    answers, summed = trainer.total([float(len(rollouts)), total])
    return summed / answers if answers else None


def shape(trainer: Trainer, scores: Tensor, rollouts: Sequence[Rollout], *, training: bool = True) -> Tensor:
    """Scores [n] -> shaped scores; in training the running moments take them in first."""
    reward, progress = trainer.ppo.reward, trainer.progress
    if training:
        count, total, square = trainer.total(moments(scores))
        progress.moments.update(count, total, square)
        if progress.initial_score is None:
            progress.initial_score = total / max(1.0, count)
    offset, scale = 0.0, 1.0
    if training and reward.normalize == "initial":
        offset = progress.initial_score or 0.0
    elif training and reward.normalize == "running":
        offset, scale = progress.moments.mean, progress.moments.deviation
    return shape_scores(
        scores,
        torch.tensor([len(rollout.tokens) for rollout in rollouts]),
        [rollout.ended for rollout in rollouts],
        offset=offset,
        scale=scale,
        clip=reward.clip,
        missing_end=reward.missing_end,
        missing_end_value=reward.missing_end_value,
        length_limit=trainer.ppo.rollout.max_new_tokens,
        length_buffer=reward.length_buffer,
        length_penalty=reward.length_penalty,
    )


def estimate(
    ppo: PPOConfig, rewards: Tensor, values: Tensor, bounds: Tensor, rollouts: Sequence[Rollout]
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [A]; without a critic each token has its answer's advantage, and there are no returns."""
    if ppo.has_critic:
        return generalized_advantages(rewards, values, bounds, ppo.gamma, ppo.gae_lambda)
    totals = sum_of_answers(rewards, bounds)
    groups = torch.tensor([rollout.question.position for rollout in rollouts])
    if ppo.estimator == "grpo":
        advantages = grouped_advantages(totals, groups, scale=ppo.group_scale)
    else:
        advantages = leave_one_out_advantages(totals, groups)
    return advantages[rows_of_tokens(bounds)], torch.zeros_like(rewards)


def update(trainer: Trainer, experience: Experience, tokens: float) -> dict[str, Any]:
    """Critic and, after its warm-up, actor: `epochs` passes of `minibatches` steps over the answers."""
    ppo, models, config = trainer.ppo, trainer.models, trainer.config
    number, actor = trainer.progress.iteration, models.actor
    of_actor = actor_loss(
        temperature=ppo.rollout.temperature,
        clip=ppo.clip,
        dual_clip=ppo.dual_clip,
        kl_coefficient=trainer.controller.coefficient if ppo.kl.place == "loss" else 0.0,
        entropy_coefficient=ppo.entropy_coefficient,
    )
    of_critic = critic_loss(clip=ppo.value_clip)
    actor_steps: list[dict[str, Any]] = []
    critic_steps: list[dict[str, Any]] = []
    warming = number < ppo.critic_warmup
    documents = 0 if warming else pretrain_rows(trainer, tokens)
    for epoch in range(ppo.epochs):
        for rows in minibatches(len(experience.rollouts), ppo.minibatches, config.seed, number, epoch):
            batches = policy_batches(
                experience, rows, ppo.micro_batch_tokens, parts_of_all_ranks(trainer, experience, rows)
            )
            if models.critic is not None:
                result = models.critic.train_step(batches, of_critic)
                critic_steps.append(described("critic", result) | {"value_loss": result.loss})
            if not warming:
                everything = [*batches, *pretraining(trainer, documents, batches)]
                result = actor.train_step(cast(Sequence[Batch], everything), of_actor)
                actor_steps.append(described("actor", result) | actor_numbers(result.parts) | {"loss": result.loss})
    values = mean_of(critic_steps) | mean_of(actor_steps)
    if actor_steps:
        values["lr"], values["grad_norm"] = values.pop("actor_lr"), values.pop("actor_grad_norm")
        values["first_ratio_distance"] = actor_steps[0]["ratio_distance"]
    return values


def described(who: str, result: StepResult) -> dict[str, Any]:
    """Rate and norm of a step; a step that was not applied says so in the log."""
    if result.verdict == "rollback":
        raise TrainingStopped(f"{result.reason}. PPO cannot roll back within a round: start the command again.")
    if not result.applied:
        log.warning("%s step not applied: %s", who, result.reason)
    return {f"{who}_lr": result.lr, f"{who}_grad_norm": result.grad_norm}


def parts_of_all_ranks(trainer: Trainer, experience: Experience, rows: Sequence[int]) -> int:
    """Micro-batches of the rank that needs most: sharded weights want equally many passes on each."""
    actor = trainer.models.actor
    sizes = [sequence_tokens(experience.rollouts[row]) for row in rows]
    mine = [0.0] * actor.data_ranks
    mine[actor.data_rank] = float(len(plan(sizes, trainer.ppo.micro_batch_tokens)))
    return int(max(trainer.total(mine)))


def pretrain_rows(trainer: Trainer, tokens: float) -> int:
    """Rows of the pretraining stream in a step, over all ranks, so that they hold about `share` of the PPO tokens."""
    if trainer.stream is None:
        return 0
    return max(1, round(trainer.ppo.pretrain.share * tokens / (trainer.ppo.updates * trainer.config.train.seq_len)))


def pretraining(trainer: Trainer, count: int, batches: Sequence[Batch]) -> list[Batch]:
    """This rank's pretraining micro-batches of a step of `count` rows, weighed against the step's action tokens.

    With fewer rows than ranks some ranks have none: the rows of a step, and so its gradient, depend on no number of
    ranks.
    """
    if trainer.stream is None or not count:
        return []
    actor, size, progress = trainer.models.actor, trainer.config.train.micro_batch, trainer.progress
    start = progress.pretrain_position
    mine = range(start + actor.data_rank, start + count, actor.data_ranks)
    rows = [trainer.stream.batch(mine[at : at + size]) for at in range(0, len(mine), size)]
    actions, targets = trainer.total(
        [float(sum(batch.loss_tokens for batch in batches)), float(sum(row.loss_tokens for row in rows))]
    )
    progress.pretrain_position += count
    weighed = pretrain_batches(rows, actions, targets, trainer.ppo.pretrain.coefficient)
    return cast(list[Batch], weighed)
