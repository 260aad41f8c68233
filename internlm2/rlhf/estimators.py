"""Advantages of sampled tokens. Pure functions on packed rows: nothing here knows a pad.

A action tokens of n answers, one answer after another; answer i has the tokens bounds[i] to bounds[i + 1]. An action
is the choice of a token, its state everything before it, so `values[t]` is the critic's value before token t was
chosen. An answer of no tokens is allowed and touches nothing.
"""

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, bounds: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016): (advantages [A], returns [A]).

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = sum_k (gamma lam)^k delta_{t+k},  return_t = A_t + V_t

    inside each answer; after its last token the value is 0: a finished answer earns nothing more, and one that was cut
    at the length limit is treated as finished there. rewards, values [A], bounds [n + 1] int64.
    """
    advantages = torch.empty_like(rewards)
    lengths, ends = bounds.diff(), bounds[1:]
    following = torch.zeros(len(lengths), dtype=rewards.dtype, device=rewards.device)  # V_{t+1} of each answer
    running = torch.zeros_like(following)  # A_{t+1}
    longest = int(lengths.max()) if len(lengths) else 0
    for back in range(1, longest + 1):
        rows = (lengths >= back).nonzero()[:, 0]
        at = ends[rows] - back
        delta = rewards[at] + gamma * following[rows] - values[at]
        running[rows] = delta + gamma * lam * running[rows]
        following[rows] = values[at]
        advantages[at] = running[rows]
    return advantages, advantages + values


def grouped_advantages(returns: Tensor, groups: Tensor, *, scale: bool = True, epsilon: float = 1e-4) -> Tensor:
    """GRPO (Shao et al. 2024): A_i = (R_i - mean of its group) / (standard deviation of its group + epsilon), [n].

    returns [n]: one number for each answer; groups [n] int64: answers to the same prompt have the same number.
    `scale=False` leaves out the division, which favours prompts that are nearly solved or nearly hopeless (Liu et al.
    2025). The standard deviation is that of the sample (n - 1); a group of one has advantage 0.
    """
    number, counts, means = _group_means(returns, groups)
    centred = returns - means[number]
    if not scale:
        return centred
    squares = torch.zeros_like(means).index_add_(0, number, centred.square())
    deviation = (squares / (counts - 1).clamp_min(1)).sqrt()
    return centred / (deviation[number] + epsilon)


def leave_one_out_advantages(returns: Tensor, groups: Tensor) -> Tensor:
    """RLOO (Kool et al. 2019; Ahmadian et al. 2024): A_i = R_i - mean of the other answers to the prompt, [n].

    Unbiased: the baseline does not depend on the answer that it judges. A group of one has no others; its advantage
    is 0.
    """
    number, counts, means = _group_means(returns, groups)
    size = counts[number]
    return torch.where(size > 1, (returns - means[number]) * size / (size - 1).clamp_min(1), 0.0)


def _group_means(returns: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(each answer's group from 0 on [n], answers in each group [g], mean of each group [g])."""
    _, number, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    counts = counts.to(returns.dtype)
    sums = torch.zeros(len(counts), dtype=returns.dtype, device=returns.device).index_add_(0, number, returns)
    return number, counts, sums / counts


def sum_of_answers(values: Tensor, bounds: Tensor) -> Tensor:
    """[A] -> [n]: the sum over each answer's tokens."""
    rows = rows_of_tokens(bounds)
    return torch.zeros(len(bounds) - 1, dtype=values.dtype, device=values.device).index_add_(0, rows, values)


def rows_of_tokens(bounds: Tensor) -> Tensor:
    """[n + 1] -> [A] int64: the answer that each token belongs to."""
    return torch.arange(len(bounds) - 1, device=bounds.device).repeat_interleave(bounds.diff())


def moments(values: Tensor) -> list[float]:
    """[count, sum, sum of squares] in float64: what ranks add up before they standardize."""
    wide = values.double()
    return [float(len(values)), wide.sum().item(), wide.square().sum().item()]


def standardize(advantages: Tensor, total: list[float], epsilon: float = 1e-8) -> Tensor:
    """(A - mean) / (standard deviation + epsilon), with the moments of the whole rollout over all ranks.

    Never of a part of it: a minibatch's own mean would shift its tokens against those of the next one. The report
    normalises nothing (report 4.2.3). Returns for the critic are made before this.
    """
    count, first, second = total
    mean = first / max(count, 1.0)
    variance = max(0.0, second / max(count, 1.0) - mean * mean)
    return (advantages - mean) / (variance**0.5 + epsilon)
