"""What looks wrong in a PPO run, in words.

Curves of reward and loss look healthy while a policy collapses (Zheng et al. 2023, PPO-max): these are the numbers that
show it, each with what it usually means.
"""

from collections.abc import Sequence
from typing import Any

# Iterations over which a trend is judged.
WINDOW = 10


def findings(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """{name of the check: sentence} for what is wrong at the newest of the iterations' records, oldest first."""
    if not records:
        return {}
    now, found = records[-1], {}
    for check in (_ratio, _drift, _kl, _ended, _critic, _length, _entropy, _gradient):
        sentence = check(now, records)
        if sentence:
            found[check.__name__.strip("_")] = sentence
    return found


def _ratio(now: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    distance = now.get("first_ratio_distance")
    limit = 1e-4 if now.get("precision") == "fp32" else 2e-2
    if distance is None or distance <= limit or now.get("old_logprobs") == "sampler":
        return ""
    return (
        f"the ratio is {distance:.2g} away from 1 at an iteration's first step, before anything was updated: dropout, "
        "another temperature, or weights that changed between scoring and training"
    )


def _drift(now: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    kl = (now.get("drift") or {}).get("kl")
    if kl is None or kl <= 1e-2:
        return ""
    return (
        f"sampler and trainer disagree by {kl:.2g} nats a token: stale or rounded weights in the sampler; "
        "ppo.correction.weights=truncated corrects for it"
    )


def _kl(now: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    kl, answers = now.get("kl"), now.get("answers") or 0
    if kl is None:
        return ""
    if kl < -1.0 and answers >= 16:
        return (
            f"KL to the reference is {kl:.2f} nats an answer, and no mean over a policy's own samples is: "
            "truncated sampling (top_p, top_k) or a sampler that is not the policy"
        )
    if kl > 50.0:
        return f"KL to the reference is {kl:.0f} nats an answer: the policy is far from what the reward model knows"
    return ""


def _ended(now: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    before = _mean(records[:WINDOW], "ended")
    ended = _mean(records[-WINDOW:], "ended")
    if before is None or ended is None or len(records) < WINDOW or ended > before - 0.15:
        return ""
    return f"{ended:.0%} of the answers end by themselves, {before:.0%} did at first: the policy learns not to stop"


def _critic(now: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    recent = [r["explained_variance"] for r in records[-WINDOW:] if r.get("explained_variance") is not None]
    if len(recent) < WINDOW or sum(recent) / len(recent) >= 0:
        return ""
    mean = sum(recent) / len(recent)
    return f"the critic's explained variance is {mean:.2f}, below 0: a constant would foresee the returns better"


def _length(now: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    tied = _mean(records[-WINDOW:], "score_length_correlation")
    if tied is not None and len(records) >= WINDOW and tied > 0.6:
        return f"score and length are correlated by {tied:.2f}: the reward model may be paying for length"
    before, after = _mean(records[:WINDOW], "length"), _mean(records[-WINDOW:], "length")
    if before and after and len(records) >= 2 * WINDOW and after > 2 * before:
        return f"answers have grown from {before:.0f} to {after:.0f} tokens"
    return ""


def _entropy(now: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    before, after = _mean(records[:WINDOW], "entropy"), _mean(records[-WINDOW:], "entropy")
    if not before or after is None or len(records) < 2 * WINDOW or after > 0.2 * before:
        return ""
    return f"entropy has fallen from {before:.3f} to {after:.3f} nats a token: the policy hardly explores any more"


def _gradient(now: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    clipped = now.get("clipped")
    if clipped is not None and clipped > 0.3:
        return f"{clipped:.0%} of the tokens are clipped: the steps are too large, lower optim.lr"
    return ""


def _mean(records: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return sum(values) / len(values) if values else None
