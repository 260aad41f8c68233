"""Metrics of one iteration: sums over answers and tokens that ranks add up, and what a person reads from them.

Everything is counted from lengths, so no mean is diluted by padding, and each name says whether it is a mean over
answers or over tokens: `kl` is nats an answer, `kl_token` nats a token.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm2.rlhf.estimators import sum_of_answers
from internlm2.rlhf.experience import Experience
from internlm2.rlhf.kl import k1, k3
from internlm2.rlhf.rollout import Rollout

Sum = Callable[[Sequence[float]], list[float]]

_ANSWER_SUMS = (
    "answers",
    "score",
    "score_square",
    "reward",
    "kl",
    "kl_k3",
    "length",
    "length_square",
    "score_length",
    "ended",
    "gold",
)


@dataclass(frozen=True)
class AnswerNumbers:
    """Of each answer [n], float64 on the host: the raw score, the shaped one, KL to the reference (k1 and k3, summed
    over its tokens), and a gold score where there is one.
    """

    scores: Tensor
    shaped: Tensor
    kl: Tensor
    kl_k3: Tensor
    gold: Tensor | None = None


def answer_numbers(
    scores: Tensor, shaped: Tensor, logprobs: Tensor, reference: Tensor, bounds: Tensor, gold: Tensor | None = None
) -> AnswerNumbers:
    """scores, shaped [n]; logprobs of the policy and of the reference [A]."""
    kl, kl_k3 = (sum_of_answers(k(logprobs, reference).double(), bounds) for k in (k1, k3))
    return AnswerNumbers(scores.double(), shaped.double(), kl, kl_k3, gold)


def by_domain(
    rollouts: Sequence[Rollout], numbers: AnswerNumbers, domains: Iterable[str], total: Sum
) -> dict[str, dict[str, float | None]]:
    """Means over the answers of all ranks, in all and for each domain: {"all": {...}, "helpful": {...}}."""
    names = sorted(domains)
    sums = {name: [0.0] * len(_ANSWER_SUMS) for name in names}
    for row, rollout in enumerate(rollouts):
        score, length = numbers.scores[row].item(), float(len(rollout.tokens))
        values = (
            1.0,
            score,
            score * score,
            numbers.shaped[row].item(),
            numbers.kl[row].item(),
            numbers.kl_k3[row].item(),
            length,
            length * length,
            score * length,
            float(rollout.ended),
            numbers.gold[row].item() if numbers.gold is not None else 0.0,
        )
        mine = sums[rollout.question.prompt.domain]
        for place, value in enumerate(values):
            mine[place] += value
    flat = total([value for name in names for value in sums[name]])
    width = len(_ANSWER_SUMS)
    parts = {name: flat[width * number : width * (number + 1)] for number, name in enumerate(names)}
    everything = [sum(part[place] for part in parts.values()) for place in range(width)]
    found = {"all": everything} | parts
    return {name: _means(part, numbers.gold is not None) for name, part in found.items() if part[0]}


def _means(sums: Sequence[float], with_gold: bool) -> dict[str, float | None]:
    count, *rest = sums
    mean = dict(zip(_ANSWER_SUMS[1:], (value / count for value in rest), strict=True))
    spread = math.sqrt(max(0.0, mean["score_square"] - mean["score"] ** 2))
    length_spread = math.sqrt(max(0.0, mean["length_square"] - mean["length"] ** 2))
    both = mean["score_length"] - mean["score"] * mean["length"]
    correlated = both / (spread * length_spread) if spread > 1e-9 and length_spread > 1e-9 else None
    found: dict[str, float | None] = {
        "answers": count,
        "score": mean["score"],
        "score_std": spread,
        "reward": mean["reward"],
        "kl": mean["kl"],
        "kl_k3": mean["kl_k3"],
        "kl_token": mean["kl"] / mean["length"] if mean["length"] else None,
        "length": mean["length"],
        "ended": mean["ended"],
        "score_length_correlation": correlated,
    }
    return found | ({"gold": mean["gold"]} if with_gold else {})


def token_spread(values: Tensor, total: Sum) -> tuple[float, float]:
    """(mean, standard deviation) over the tokens of all ranks."""
    wide = values.double()
    count, first, second = total([float(len(wide)), wide.sum().item(), wide.square().sum().item()])
    mean = first / max(1.0, count)
    return mean, math.sqrt(max(0.0, second / max(1.0, count) - mean * mean))


def critic_numbers(experience: Experience, total: Sum) -> dict[str, float | None]:
    """How well the critic foresaw the returns, before it was trained on them.

    explained_variance = 1 - Var(return - V) / Var(return) over tokens: 1 is a perfect critic, 0 one that knows the mean
    alone, below 0 one that does harm.
    """
    mean, spread = token_spread(experience.returns, total)
    _, left = token_spread(experience.returns - experience.values, total)
    value, _ = token_spread(experience.values, total)
    explained = 1.0 - (left / spread) ** 2 if spread > 1e-9 else None
    return {"return": mean, "return_std": spread, "value": value, "explained_variance": explained}


def drift(trainer: Tensor, rollouts: Sequence[Rollout], tempered: bool, total: Sum) -> dict[str, float]:
    """How far the sampler's log-probabilities lie from the trainer's, over the tokens of all ranks.

    kl: the k3 estimate of KL(sampler || trainer), nats a token; mean: of the difference; largest: of its absolute
    value on this rank. `tempered` compares with the distribution that was drawn from, truncation included; else with
    the sampler's softmax at temperature 1.
    """
    drawn = sampler_logprobs(rollouts, tempered)
    difference = (drawn - trainer).double()
    k3_values = k3(drawn.double(), trainer.double())
    count, first, third = total([float(len(drawn)), difference.sum().item(), k3_values.sum().item()])
    largest = difference.abs().max().item() if len(difference) else 0.0
    return {"kl": third / max(1.0, count), "mean": first / max(1.0, count), "largest": largest}


def sampler_logprobs(rollouts: Sequence[Rollout], tempered: bool) -> Tensor:
    """[A] float32, as the sampler computed them."""
    values = [v for r in rollouts for v in (r.sampling_logprobs if tempered else r.logprobs)]
    return torch.tensor(values, dtype=torch.float32)


def actor_numbers(parts: dict[str, float]) -> dict[str, float | None]:
    """Means from the sums of one actor step, over all ranks and micro-batches."""
    tokens, rows = parts["tokens"], parts["pretrain_tokens"]
    mean = {name: parts[name] / tokens for name in parts if name not in ("tokens", "pretrain", "pretrain_tokens")}
    found: dict[str, float | None] = {
        "policy_loss": mean["policy"],
        "ratio": mean["ratio"],
        "ratio_std": math.sqrt(max(0.0, mean["ratio_square"] - mean["ratio"] ** 2)),
        "ratio_distance": mean["ratio_distance"],
        "clipped": mean["clipped"],
        "kl_old": mean["kl_old"],
        "pretrain_loss": parts["pretrain"] / rows if rows else None,
        "pretrain_tokens": rows,
    }
    return found


def mean_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of each number over the optimizer steps of an iteration; a sum for counts of tokens."""
    merged: dict[str, Any] = {}
    for name in records[0] if records else ():
        values = [record[name] for record in records if record[name] is not None]
        if not values:
            merged[name] = None
        else:
            merged[name] = sum(values) if name.endswith("tokens") else sum(values) / len(values)
    return merged
