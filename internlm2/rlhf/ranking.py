"""Losses of the reward model as pure functions (report 4.2.1).

n pairs; `chosen` and `rejected` are their scores, [n]; d = chosen - rejected and P = sigmoid(d), the probability that
the Bradley-Terry model gives to the label. All compute in float32 at least, whatever the dtype of the scores.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ranking_losses(chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), [n]: Bradley-Terry (Ouyang et al. 2022), with `margin` that of Llama 2
    (Touvron et al. 2023): a gap that the scores have to exceed.
    """
    return -F.logsigmoid(_wide(chosen) - _wide(rejected) - margin)


def focal_ranking_losses(
    chosen: Tensor, rejected: Tensor, *, gamma: float = 2.0, detach: bool = False, margin: Tensor | float = 0.0
) -> Tensor:
    """-(1 - 2 max(0, P - 1/2))^gamma log P, [n]: pairs that are clearly right weigh less (report 4.2.1).

    The gradient flows through the weight, as the formula says. It then jumps at d = 0, from -1/2 on the wrong side to
    -1/2 - gamma log(2) / 2 on the right one, so that a pair that is barely right pulls harder than one that is barely
    wrong. `detach` keeps the weight out of the gradient; the loss is the same.
    """
    difference = _wide(chosen) - _wide(rejected) - margin
    weight = (1.0 - 2.0 * F.relu(torch.sigmoid(difference) - 0.5)) ** gamma
    return -(weight.detach() if detach else weight) * F.logsigmoid(difference)


def log_barrier(scores: Tensor, *, bound: float = 5.0, eps: float = 1e-3) -> Tensor:
    """-(log(x + bound) + log(bound - x)) of each score: keeps scores inside (-bound, bound) (report 4.2.1).

    Beyond |x| = bound - eps it goes on as its tangent, so that a score that escaped is pulled back by a finite gradient
    of about 1 / eps. (Clamping the score instead would leave it there for ever: its gradient is zero.) The least value
    is -2 log(bound), at 0, so a total loss may well be negative.
    """
    scores = _wide(scores)
    limit = bound - eps
    inside = scores.clamp(-limit, limit)
    value = -(torch.log(bound + inside) + torch.log(bound - inside))
    slope = 1.0 / (bound - limit) - 1.0 / (bound + limit)
    return value + slope * F.relu(scores.abs() - limit)


def pair_barriers(chosen: Tensor, rejected: Tensor, *, bound: float = 5.0, eps: float = 1e-3) -> Tensor:
    """The barrier of each pair, [n]: the mean over its two scores.

    The mean over pairs is then the mean over all scores, which the report's factor of 0.02 belongs to; XTuner's public
    code sums the two and has 0.01.
    """
    return (log_barrier(chosen, bound=bound, eps=eps) + log_barrier(rejected, bound=bound, eps=eps)) / 2


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
