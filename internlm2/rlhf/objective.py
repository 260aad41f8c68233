"""The losses of actor and critic as an engine takes them: sums over micro-batches, divided once.

The actor's objective is a mean over action tokens plus `coefficient` times a mean over pretraining tokens (report
4.2.3). An engine has one denominator, the number of action tokens N of the step; so a pretraining batch counts no
tokens and weighs its sum with coefficient * N / M, M being the pretraining tokens of the step. Both numbers are known
before the first backward pass and sum over all ranks, so any split into micro-batches and any number of ranks has the
same gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internlm2.data.batch import PackedBatch
from internlm2.engine.base import LossSum
from internlm2.rlhf.experience import PolicyBatch
from internlm2.rlhf.kl import k2
from internlm2.rlhf.losses import policy_loss, value_loss

# Sums that the actor's steps report; a batch that has no part in one adds 0.
ACTOR_PARTS = (
    "tokens",
    "policy",
    "ratio",
    "ratio_square",
    "ratio_distance",
    "clipped",
    "kl_old",
    "kl_loss",
    "entropy",
    "pretrain",
    "pretrain_tokens",
)


@dataclass(frozen=True)
class PretrainBatch:
    """Pretraining rows in an actor's step: no tokens of their own in the denominator, a weight on their sum."""

    batch: PackedBatch
    weight: float
    loss_tokens: int = 0

    def to(self, device: torch.device | str) -> "PretrainBatch":
        return PretrainBatch(self.batch.to(device), self.weight)


def pretrain_batches(
    batches: Sequence[PackedBatch], actions: float, tokens: float, coefficient: float
) -> list[PretrainBatch]:
    """`actions`, `tokens`: action and pretraining tokens of the whole step, over all ranks."""
    weight = coefficient * actions / tokens if tokens else 0.0
    return [PretrainBatch(batch, weight) for batch in batches]


def actor_loss(
    *,
    temperature: float,
    clip: float,
    dual_clip: float | None = None,
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
) -> Callable[[nn.Module, Any], LossSum]:
    """The loss function of an actor's step over PolicyBatch and PretrainBatch.

    kl_coefficient  of k2 as a loss; 0 where the penalty is part of the reward
    """

    def loss(model: Any, batch: PolicyBatch | PretrainBatch) -> LossSum:
        if isinstance(batch, PretrainBatch):
            documents = batch.batch
            summed = model(documents.ids, documents.cu_seqlens, documents.max_seqlen, documents.labels)
            counted = {"pretrain": summed.detach(), "pretrain_tokens": summed.new_tensor(float(documents.loss_tokens))}
            return LossSum(summed * batch.weight, 0, _all_parts(counted, summed))
        rows = batch.packed
        logprobs, entropy = model.logprobs(
            rows.ids, rows.cu_seqlens, rows.max_seqlen, rows.at, rows.labels, temperature
        )
        found = policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, clip=clip, dual_clip=dual_clip, weights=batch.weights
        )
        losses, drift = found.losses, k2(logprobs, batch.reference)
        if kl_coefficient:
            losses = losses + kl_coefficient * drift
        if entropy_coefficient:
            losses = losses - entropy_coefficient * entropy
        counted = {
            "tokens": logprobs.new_tensor(float(batch.loss_tokens)),
            "policy": found.losses.detach().sum(),
            "ratio": found.ratio.sum(),
            "ratio_square": found.ratio.square().sum(),
            "ratio_distance": (found.ratio - 1).abs().sum(),
            "clipped": found.clipped.sum().to(logprobs.dtype),
            "kl_old": found.kl.sum(),
            "kl_loss": drift.detach().sum(),
            "entropy": entropy.detach().sum(),
        }
        return LossSum(losses.sum(), batch.loss_tokens, _all_parts(counted, losses))

    return loss


def critic_loss(*, clip: float | None = None) -> Callable[[nn.Module, Any], LossSum]:
    """The loss function of a critic's step: 0.5 (V - return)^2 at the states before each action."""

    def loss(model: Any, batch: PolicyBatch) -> LossSum:
        rows = batch.packed
        values = model(rows.ids, rows.cu_seqlens, rows.max_seqlen, rows.at)
        losses = value_loss(values, batch.returns, batch.values, clip)
        return LossSum(losses.sum(), batch.loss_tokens)

    return loss


def _all_parts(counted: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    zero = like.detach().new_zeros(())
    return {name: counted.get(name, zero) for name in ACTOR_PARTS}
