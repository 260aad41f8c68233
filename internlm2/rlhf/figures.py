"""PPO's figures for the report, from the records in metrics.jsonl."""

import math
from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]


def figures(records: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """{file name: figure} for evaluation/."""
    checked = [record for record in records if record.get("held_out")]
    drawn = {
        "ppo_reward_kl": _reward_against_kl(checked),
        "ppo_validation": _validation(checked),
        "ppo_score": _curves("Score of the rollouts", "score", records, "score", by_domain=True),
        "ppo_kl": _curves("KL to the reference", "nats an answer", records, "kl", by_domain=True),
        "ppo_length": _curves("Length of the answers", "tokens", records, "length", by_domain=True),
        "ppo_ended": _curves("Answers that end by themselves", "share", records, "ended", by_domain=True),
        "ppo_value_loss": _curves("Value loss", "0.5 (V - return)²", records, "value_loss"),
        "ppo_explained_variance": _curves("Explained variance of the critic", "share", records, "explained_variance"),
        "ppo_entropy": _curves("Entropy", "nats a token", records, "entropy"),
    }
    return {name: figure for name, figure in drawn.items() if any(line["y"] for line in figure["series"])}


def _reward_against_kl(checked: Sequence[dict[str, Any]]) -> Figure:
    """Score against the square root of the KL (Gao et al. 2023), where over-optimisation shows as a bend."""
    series = []
    for domain, points in _validation_points(checked).items():
        xs = [math.sqrt(max(0.0, point["kl"])) for _, point in points]
        series.append({"label": domain, "x": xs, "y": [point["score"] for _, point in points]})
        if domain == "all" and "gold" in points[0][1]:
            series.append({"label": "gold, all", "x": xs, "y": [point["gold"] for _, point in points]})
    return {
        "title": "Reward against KL on held-out prompts",
        "x_label": "√KL to the reference (√nats an answer)",
        "y_label": "score",
        "series": series,
    }


def _validation(checked: Sequence[dict[str, Any]]) -> Figure:
    series = [
        {"label": domain, "x": [step for step, _ in points], "y": [point["score"] for _, point in points]}
        for domain, points in _validation_points(checked).items()
    ]
    return {"title": "Score on held-out prompts", "x_label": "iteration", "y_label": "score", "series": series}


def _validation_points(checked: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for record in checked:
        for domain, point in record["held_out"].items():
            found.setdefault(domain, []).append((record["step"], point))
    if len(found) == 2:  # one domain is all of it
        found.pop(next(domain for domain in found if domain != "all"))
    return found


def _curves(title: str, unit: str, records: Sequence[dict[str, Any]], key: str, *, by_domain: bool = False) -> Figure:
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        domains = record.get("domains") or {}
        named = {"all": record} | (domains if by_domain and len(domains) > 1 else {})
        for label, values in named.items():
            if values.get(key) is not None:
                lines.setdefault(label, []).append((record["step"], values[key]))
    series = [
        {"label": label, "x": [step for step, _ in points], "y": [value for _, value in points]}
        for label, points in lines.items()
    ]
    return {"title": title, "x_label": "iteration", "y_label": unit, "series": series}
