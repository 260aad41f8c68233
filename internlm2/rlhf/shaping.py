"""From the reward model's score of an answer to a reward for each of its tokens.

In this order: centre or normalise, clip, length and missing end, then -beta * (log p - log q) on every token. The
score stands on the last token that was generated, the end of turn or the one at the length limit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far (Chan, Golub and LeVeque 1979: exact however they come in parts)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def update(self, count: float, total: float, square_total: float) -> None:
        """Add a batch given by its count, sum and sum of squares over all ranks."""
        if count <= 0:
            return
        mean = total / count
        squares = max(0.0, square_total - count * mean * mean)
        both, distance = self.count + count, mean - self.mean
        self.squares += squares + distance * distance * self.count * count / both
        self.mean += distance * count / both
        self.count = both

    @property
    def deviation(self) -> float:
        """Standard deviation of the population; 1 before there are two scores that differ."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint; floats survive JSON exactly."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = (float(state[key]) for key in ("count", "mean", "squares"))


def shape_scores(
    scores: Tensor,
    lengths: Tensor,
    ended: Sequence[bool],
    *,
    offset: float = 0.0,
    scale: float = 1.0,
    clip: float | None = None,
    missing_end: str = "none",
    missing_end_value: float = 0.0,
    length_limit: int = 0,
    length_buffer: int = 0,
    length_penalty: float = 0.0,
) -> Tensor:
    """scores [n] -> shaped scores [n]; lengths [n] in tokens, `ended` whether an answer closed its turn.

    offset, scale      (score - offset) / scale
    clip               to [-clip, clip]; None: no limit
    missing_end        replace: an answer without an end gets `missing_end_value` whatever its score, which is safe with
                       any reward model; subtract: that value is taken from its score; none
    length_buffer      answers of the last `length_buffer` tokens before `length_limit` lose up to `length_penalty`,
                       linearly (soft overlong punishment, DAPO, Yu et al. 2025); 0: off
    """
    shaped = (scores - offset) / scale
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    if length_buffer > 0:
        over = (lengths.to(shaped.dtype) - (length_limit - length_buffer)).clamp_min(0.0) / length_buffer
        shaped = shaped - length_penalty * over.clamp_max(1.0)
    open_ended = ~torch.tensor(list(ended), dtype=torch.bool, device=scores.device)
    if missing_end == "replace":
        shaped = torch.where(open_ended, torch.full_like(shaped, missing_end_value), shaped)
    elif missing_end == "subtract":
        shaped = torch.where(open_ended, shaped - missing_end_value, shaped)
    return shaped


def token_rewards(shaped: Tensor, penalty: Tensor, bounds: Tensor) -> Tensor:
    """-penalty on every token, plus the answer's shaped score on its last one, [A].

    shaped [n], penalty [A] (beta times the k1 estimate), bounds [n + 1]. An answer of no tokens gets none.
    """
    rewards = -penalty
    rows = bounds.diff() > 0
    last = bounds[1:][rows] - 1
    rewards[last] = rewards[last] + shaped[rows].to(rewards.dtype)
    return rewards
