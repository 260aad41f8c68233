"""How good is the policy on prompts that it is never trained on? The same prompts and draws in every iteration."""

from typing import Any

import torch

from internlm2.rlhf.experience import bounds_of, plan, sequence_tokens
from internlm2.rlhf.measure import answer_numbers, by_domain
from internlm2.rlhf.rewards import RuleReward
from internlm2.rlhf.rollout import as_sample, ask, collect
from internlm2.run.directory import RunDirectory
from internlm2.stages.ppo_iteration import Trainer, policy_logprobs, shape
from internlm2.stages.ppo_models import sampling_weights
from internlm2.stages.ppo_samples import keep_rollouts, readable

# Answers that the report shows.
SHOWN = 4


class Validation:
    """Held-out prompts, and a gold score of their answers where the config names a rule for it; no gradient ever comes
    from either.
    """

    def __init__(self, trainer: Trainer, run: RunDirectory) -> None:
        settings, limit = trainer.ppo.validation, trainer.ppo.rollout.max_prompt_tokens
        asked = [ask(p, number, trainer.tokenizer) for number, p in enumerate(trainer.prompts.held_out(settings.rows))]
        self.questions = [question for question in asked if len(question.ids) <= limit]
        self.gold = None if settings.gold is None else RuleReward(settings.gold)
        self.run = run

    def measure(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """By domain and in all: score, reward (shaped, not normalised), KL, length, ended and, if asked for, gold."""
        actor = trainer.models.actor
        mine = self.questions[actor.data_rank :: actor.data_ranks]
        with sampling_weights(trainer.models, trainer.config) as sampler:
            rollouts = collect(sampler, mine, trainer.sampling("validation", 0, 1), trainer.tokenizer)
        packs = plan([sequence_tokens(rollout) for rollout in rollouts], trainer.ppo.micro_batch_tokens)
        logprobs, reference, _ = policy_logprobs(trainer, rollouts, packs)
        samples = [as_sample(rollout) for rollout in rollouts]
        scores = torch.tensor(trainer.models.score(samples), dtype=torch.float64)
        shaped = shape(trainer, scores, rollouts, training=False)
        gold = None if self.gold is None else torch.tensor(self.gold(samples), dtype=torch.float64)
        numbers = answer_numbers(scores, shaped, logprobs, reference, bounds_of(rollouts), gold)
        keep_rollouts(self.run, f"validation_{step:08d}", rollouts, numbers)
        if self.run.writes:
            text = readable(rollouts, numbers, SHOWN)
            (self.run.samples / f"step_{step:08d}.txt").write_text(text, encoding="utf-8")
        domains = {question.prompt.domain for question in self.questions}
        return by_domain(rollouts, numbers, domains, trainer.total)
