"""KL divergence from a reference: estimators from samples, and what each of them may be used for.

For a token drawn from p, with d = log p - log q:

    k1 = d                    unbiased for KL(p || q), may be negative for a token
    k2 = d^2 / 2              biased, low variance
    k3 = exp(-d) - 1 + d      unbiased, never negative (Schulman, "Approximating KL divergence", 2020)

As a *penalty in the reward* the policy gradient weighs d log p by the penalty: only k1 gives the gradient of KL(p || q)
there. k2 and k3 give gradients that point elsewhere (k3's is grad KL(p || q) - grad KL(q || p), which cancels to first
order). As a *loss* the estimator itself is differentiated: k1's gradient is zero in expectation, k2's is that of
KL(p || q), k3's that of the other direction, KL(q || p). tests/rlhf holds this by enumeration. Hence k1 in the reward
(as in the report), k2 in the loss, and k3 as a metric.
"""

from dataclasses import dataclass

from torch import Tensor

from internlm2.rlhf.losses import LOG_RATIO_LIMIT


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log p - log q of the drawn tokens, [A]."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(log p - log q)^2 / 2, [A]; as a loss its expected gradient is that of KL(p || q)."""
    return 0.5 * (logprobs - reference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).square()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """q / p - 1 + log p - log q, [A], at least 0."""
    difference = (logprobs - reference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (-difference).exp() - 1.0 + difference


@dataclass
class KLController:
    """The penalty's coefficient: fixed (`target=None`), or drawn towards a KL of `target` nats an answer.

    Adaptive as in Ziegler et al. (2019): coefficient *= 1 + clip(KL / target - 1, -0.2, 0.2) * answers / horizon.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10000

    def update(self, kl: float, answers: int) -> None:
        """After an iteration of `answers` answers with a mean KL of `kl` nats an answer."""
        if self.target is not None:
            error = min(0.2, max(-0.2, kl / self.target - 1.0))
            self.coefficient *= 1.0 + error * answers / self.horizon

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """A fixed coefficient is the config's; an adaptive one goes on where it was."""
        if self.target is not None:
            self.coefficient = float(state["coefficient"])
