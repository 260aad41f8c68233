"""What the report shows of the rounds: quality by round, hacks that came and went, and what was decided."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internlm2.rlhf.answers import Answer, read_answers
from internlm2.run.metrics import read_records

# Quantities of round.json's "fixed" that are drawn, with the label of their axis.
_DRAWN = {"gold": "gold reward", "score": "score of the round's reward model", "tokens": "tokens of an answer"}


def figures(rounds: Sequence[dict[str, Any]], root: Path) -> dict[str, dict[str, Any]]:
    """Figures by file name. `rounds`: what each round.json says; `root`: where the rounds' directories are."""
    drawn = {f"rounds_{name}": _by_round(rounds, name, label) for name, label in _DRAWN.items() if _has(rounds, name)}
    if _has(rounds, "gold_by_domain"):
        drawn["rounds_gold_by_domain"] = _gold_by_domain(rounds)
    if any(one["audit"] for one in rounds):
        drawn["rounds_audit"] = _audit(rounds)
    if all((root / f"round_{one['round']}" / "best_of.json").exists() for one in rounds):
        drawn["rounds_best_of"] = _best_of(rounds, root)
    phrases = sorted({p["detail"] for one in rounds for p in one["patterns"] if p["name"] == "phrase" and p["patch"]})
    for number, phrase in enumerate(phrases):
        drawn[f"rounds_phrase_{number}"] = _phrase(rounds, root, phrase)
    drawn["rounds_decisions"] = {
        "title": "What each round found and decided",
        "rows": [
            {"round": one["round"], "found": line} for one in rounds for line in (*_findings(one), *one["decisions"])
        ],
    }
    return drawn


def round_line(one: dict[str, Any]) -> dict[str, Any]:
    """One row of the table of the rounds' data."""
    pairs = {model: sum(entry["pairs"] for entry in files) for model, files in one["preferences"].items()}
    return {
        "round": one["round"],
        "policy from": one["policy"],
        "reward model": one["reward_model"],
        **{f"new pairs of the {model} model": count for model, count in pairs.items()},
        "pairs made against hacks": one["fast_pairs"],
        "comparisons asked": one["comparisons"],
    }


def phrase_share(answers: Sequence[Answer], phrase: str) -> float:
    """Share of the answers that say a phrase."""
    return sum(f" {phrase} " in f" {answer.text} " for answer in answers) / max(1, len(answers))


def _has(rounds: Sequence[dict[str, Any]], name: str) -> bool:
    return all(name in one["fixed"]["late"] for one in rounds)


def _by_round(rounds: Sequence[dict[str, Any]], name: str, label: str) -> dict[str, Any]:
    numbers = [one["round"] for one in rounds]
    values = {policy: [one["fixed"][policy][name] for one in rounds] for policy in ("sft", "late")}
    return {
        "title": f"{label[0].upper()}{label[1:]}, on held-out prompts",
        "x_label": "round",
        "y_label": label,
        "series": [
            {"label": "SFT policy", "x": numbers, "y": values["sft"]},
            {"label": "policy at the round's end", "x": numbers, "y": values["late"]},
        ],
        "note": f"{values['sft'][0]:.2f} of the SFT policy; rounds: " + ", ".join(f"{v:.2f}" for v in values["late"]),
    }


def _gold_by_domain(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = rounds[0]["fixed"]["sft"]["gold_by_domain"]
    numbers = [0, *(one["round"] for one in rounds)]
    series = [
        {"label": d, "x": numbers, "y": [first[d], *(one["fixed"]["late"]["gold_by_domain"][d] for one in rounds)]}
        for d in first
    ]
    return {
        "title": "Gold reward by domain",
        "x_label": "round (0: SFT)",
        "y_label": "gold reward",
        "series": series,
    }


def _audit(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = [one["round"] for one in rounds]
    names = {"gain": "gain of the optimised model", "audit_gain": "gain of the audit model"}
    return {
        "title": "What the optimised and the audit reward model see of a round's gain",
        "x_label": "round",
        "y_label": "gain in score",
        "series": [
            {"label": label, "x": numbers, "y": [one["audit"][name] for one in rounds]} for name, label in names.items()
        ],
        "note": "; ".join(
            f"round {one['round']}: {'alarm' if one['audit']['alarm'] else 'no alarm'}"
            for one in rounds
            if one["audit"]
        ),
    }


def _best_of(rounds: Sequence[dict[str, Any]], root: Path) -> dict[str, Any]:
    """Gold reward against KL: of each round's policy as it trains, and of best-of-n with the same reward model."""
    series = []
    for folder in (root / f"round_{one['round']}" for one in rounds):
        name = folder.name.replace("_", " ")
        checked = [r["held_out"]["all"] for r in read_records(folder / "policy" / "metrics.jsonl") if r.get("held_out")]
        drawn = json.loads((folder / "best_of.json").read_text(encoding="utf-8"))
        for label, points in ((f"{name}, PPO", checked), (f"{name}, best of n", drawn)):
            xs = [math.sqrt(max(0.0, point["kl"])) for point in points]
            series.append({"label": label, "x": xs, "y": [point["gold"] for point in points]})
    return {
        "title": "Gold reward against KL: PPO, and the best of n answers of the SFT policy",
        "x_label": "√KL to the SFT policy (√nats an answer)",
        "y_label": "gold reward",
        "series": series,
        "note": "best of n: the same prompts' answers of the SFT policy, chosen by the reward model of that round",
    }


def _phrase(rounds: Sequence[dict[str, Any]], root: Path, phrase: str) -> dict[str, Any]:
    numbers = [one["round"] for one in rounds]
    shares = {
        policy: [
            phrase_share(read_answers(root / f"round_{n}" / "answers" / f"{policy}.jsonl"), phrase) for n in numbers
        ]
        for policy in ("sft", "early", "late")
    }
    return {
        "title": f"The hack {phrase!r}: who says it",
        "x_label": "round",
        "y_label": "share of answers",
        "series": [{"label": policy, "x": numbers, "y": values} for policy, values in shares.items()],
        "note": "at the end of each round: " + ", ".join(f"{share:.0%}" for share in shares["late"]),
    }


def _findings(one: dict[str, Any]) -> list[str]:
    return [
        f"{'hack' if pattern['patch'] else 'drift'}: {pattern['summary']} ({pattern['verdict']})"
        for pattern in one["patterns"]
    ]
