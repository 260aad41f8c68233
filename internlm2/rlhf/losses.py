"""PPO's losses a token. Pure functions; the caller sums them and divides once, over all ranks and micro-batches.

A action tokens. Log-probabilities are natural, of softmax(logits / temperature).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# exp of more would overflow in float32 after two or three products; a ratio of e^20 is a broken run in any case.
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """`losses` [A] with a graph; the rest detached, [A] each: `ratio`, `clipped` (bool) and `kl`, the k3 estimate of
    KL(old || new).
    """

    losses: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate (Schulman et al. 2017), each tensor [A]:

        rho = exp(logprob - old logprob),  loss = max(-A rho, -A clip(rho, 1 - clip, 1 + clip))

    dual_clip  c > 1 also bounds the loss of a negative advantage by -A c (Ye et al. 2020)
    weights    truncated importance weights of the sampler against the old policy; they multiply the loss
    """
    log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    free, bounded = -advantages * ratio, -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    losses = torch.maximum(free, bounded)
    clipped = bounded > free
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        beyond = (advantages < 0) & (losses > ceiling)
        losses, clipped = torch.where(beyond, ceiling, losses), clipped | beyond
    if weights is not None:
        losses = losses * weights
    with torch.no_grad():
        kl = ratio - 1.0 - log_ratio
    return PolicyLoss(losses, ratio.detach(), clipped, kl)


def importance_weights(old_logprobs: Tensor, sampled_logprobs: Tensor, limit: float) -> Tensor:
    """min(pi_old / pi_sampler, limit) a token, [A] (truncated importance sampling, Yao et al. 2025).

    The sampler is another program than the trainer: rounded weights, other kernels or a truncated distribution make
    its tokens a sample of another policy than the one whose gradient is wanted.
    """
    log_ratio = (old_logprobs - sampled_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp().clamp_max(limit)


def value_loss(values: Tensor, returns: Tensor, old_values: Tensor | None = None, clip: float | None = None) -> Tensor:
    """0.5 (V - return)^2 a token, [A]. The report does not clip it (report 4.2.3).

    clip  if given, the larger of that and 0.5 (old + clip(V - old, -clip, clip) - return)^2 with the values of the
          rollout, not those of the epoch before. With scores in (-5, 5) a small clip throttles the critic.
    """
    losses = 0.5 * (values - returns).square()
    if clip is None:
        return losses
    if old_values is None:
        raise ValueError("a clipped value loss needs the values of the rollout.")
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(losses, 0.5 * (near - returns).square())
