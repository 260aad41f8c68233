"""The audit reward model: trained on pairs that the optimised one never saw, and never optimised against.

What a policy gains on the model that it is trained on is partly real and partly the model's error. A second model of
the same make has other errors, so that it sees the real part only: when the second gains much less than the first, or
the two stop agreeing about which answers are good, the policy has begun to exploit the first (over-optimisation, Gao
et al. 2210.10760; ensembles against it, Coste et al. 2310.02743).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from internlm2.config.rounds import AuditConfig
from internlm2.permutation import derive_key


@dataclass(frozen=True, slots=True)
class AuditVerdict:
    """How the two models see what a round did. Gains are mean(late) - mean(start), in each model's own score."""

    gain: float  # of the model that the round optimised
    audit_gain: float
    gain_ratio: float | None  # audit_gain / gain; None where the round gained nothing
    correlation_start: float | None
    correlation_late: float | None
    reasons: tuple[str, ...]

    @property
    def alarm(self) -> bool:
        """Does anything speak for over-optimisation?"""
        return bool(self.reasons)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"reasons": list(self.reasons), "alarm": self.alarm}


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's r of two equally long sequences; None where one of them is constant or shorter than two."""
    if len(first) != len(second):
        raise ValueError(f"correlation of {len(first)} and {len(second)} numbers")
    if len(first) < 2:
        return None
    mean_first, mean_second = sum(first) / len(first), sum(second) / len(second)
    products = sum((a - mean_first) * (b - mean_second) for a, b in zip(first, second))
    spread = math.sqrt(sum((a - mean_first) ** 2 for a in first) * sum((b - mean_second) ** 2 for b in second))
    return None if spread <= 1e-12 else products / spread


def judge(
    start: tuple[Sequence[float], Sequence[float]], late: tuple[Sequence[float], Sequence[float]], limits: AuditConfig
) -> AuditVerdict:
    """Compare (scores, audit scores) of the answers that a round starts with and of those that it ends with."""
    gain, audit_gain = (_mean(late[which]) - _mean(start[which]) for which in (0, 1))
    ratio = audit_gain / gain if gain > 0 else None
    before, after = correlation(*start), correlation(*late)
    reasons = []
    if ratio is not None and gain >= limits.smallest_gain and ratio < limits.gain_ratio:
        reasons.append(
            f"the audit model gained {audit_gain:+.2f} where the optimised one gained {gain:+.2f}: "
            f"a share of {ratio:.2f}, below {limits.gain_ratio:g}"
        )
    if after is not None and after < limits.correlation:
        reasons.append(
            f"the two models correlate at {after:.2f} on the round's last answers, below {limits.correlation:g}"
            + ("" if before is None else f" (at its start {before:.2f})")
        )
    return AuditVerdict(gain, audit_gain, ratio, before, after, tuple(reasons))


def for_audit(question: str, share: float) -> bool:
    """Does a pair about this question belong to the audit model's data? A function of the text alone, so that no
    question is ever seen by both models.
    """
    return derive_key("audit", question) < share * 2.0**64


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
