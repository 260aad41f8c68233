"""The rounds of online RLHF (report 4.2.2), each a sequence of phases that leave their result on disk.

A round's directory `ppo/round_<k>/`:

    preferences/   the pairs that earlier rounds left, as they were known when this one began; for each of the models
    manifest.json  what the round starts from: policy, reward model, audit model, every file of preferences
    reward/        the reward model, trained on all data so far (from round two on), a run directory of its own
    audit/         the audit model, the same on data of its own
    policy/        PPO, a run directory of its own
    answers/       sft.jsonl, early.jsonl, late.jsonl: answers of three policies to the same prompts, with scores
    fixed_*.jsonl  the SFT and the last policy's answers to held-out prompts that are the same in every round
    fast.jsonl     pairs against the patterns in hacks.json
    annotation/    requests to people, and labels as they come back
    slow.jsonl     pairs from the labels; made when a later round first needs them
    round.json     what was found and decided; the round is complete
    best_of.json   what its reward model can do without training

A phase whose result is there is skipped, and one that was interrupted goes on or begins again, so that a run killed
anywhere ends with the same numbers. What each phase does to models comes as functions (`Work`); this file decides.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from internlm2.config.rounds import RoundsConfig
from internlm2.rlhf.answers import Answer, read_answers, read_lines, write_answers, write_lines
from internlm2.rlhf.audit import AuditVerdict, judge
from internlm2.rlhf.best_of import best_of_kl, expected_best_of, powers_of_two
from internlm2.rlhf.hacks import detect
from internlm2.rlhf.patches import patches
from internlm2.rlhf.patterns import Pattern, mean
from internlm2.run.atomic import replace_text
from internlm2.stages.round_pairs import ask, collect_pairs, pair_files
from internlm2.stages.round_work import POLICIES, Score, Start, Work

log = logging.getLogger(__name__)


def run_rounds(root: Path, start: Start, config: RoundsConfig, work: Work) -> list[dict[str, Any]]:
    """Every round to its end; returns what their round.json say. Raises Stopped."""
    done = []
    for number in range(1, config.count + 1):
        folder = root / f"round_{number}"
        if not (folder / "round.json").exists():
            _run_round(root, number, start, config, work)
        if config.best_of.samples > 1 and work.gold is not None and not (folder / "best_of.json").exists():
            work.alone(partial(_best_of, folder, start, config, work, work.gold))
        done.append(json.loads((folder / "round.json").read_text(encoding="utf-8")))
    return done


def _run_round(root: Path, number: int, start: Start, config: RoundsConfig, work: Work) -> None:
    folder = root / f"round_{number}"
    log.info("round %d of %d, in %s", number, config.count, folder)
    work.alone(lambda: collect_pairs(root, number, start.seed, config, work))
    files = pair_files(root, number, config)
    audit = _reward_model(root, number, "audit", files["audit"], work) if config.audit.enabled else None
    reward = start.reward if number == 1 else _reward_model(root, number, "reward", files["reward"], work)
    policy = start.sft
    if config.start == "previous" and number > 1:
        policy = work.checkpoints(root / f"round_{number - 1}" / "policy")[1]
    manifest: dict[str, Any] = {
        "round": number,
        "policy": str(policy),
        "reward_model": str(reward),
        "audit_model": None if audit is None else str(audit),
        "preferences": {
            model: [{"file": str(file), "pairs": len(read_lines(file))} for file in some]
            for model, some in files.items()
        },
    }
    work.alone(lambda: _write(folder / "manifest.json", manifest))
    work.train_policy(folder / "policy", policy, reward, number)
    work.alone(lambda: _conclude(root, number, start, config, work, manifest))


def _reward_model(root: Path, number: int, model: str, files: Sequence[Path], work: Work) -> Path:
    """The reward or audit model of a round: trained, or that of the round before where no pair has come since. The
    same data, start and seed would make the same weights.
    """
    if number > 1:
        before = json.loads((root / f"round_{number - 1}" / "manifest.json").read_text(encoding="utf-8"))
        known = [Path(entry["file"]) for entry in before["preferences"].get(model, [])]
        if before[f"{model}_model"] and list(map(read_lines, known)) == list(map(read_lines, files)):
            log.info("no new pair for the %s model: that of round %d stays", model, number - 1)
            return Path(before[f"{model}_model"])
    return work.train_reward(root / f"round_{number}" / model, files, model == "audit")


def _conclude(
    root: Path, number: int, start: Start, config: RoundsConfig, work: Work, manifest: dict[str, Any]
) -> None:
    """What is done with a round's policy: collect, judge, detect, ask, decide."""
    folder, audit = root / f"round_{number}", manifest["audit_model"]
    score = _scores(work, Path(manifest["reward_model"]), None if audit is None else Path(audit))
    answers = _collect(folder, number, start, config, work, score)
    fixed = _answer_fixed(folder, start, work, score)
    verdict = None if audit is None else _audit_verdict(answers, config)
    patterns = _fast_path(folder, answers, config, score)
    asked = ask(root, number, answers, start.seed, config, work)
    decisions = _decisions(number, config, verdict, patterns, asked)
    summary = manifest | {
        "fixed": {policy: describe(fixed[policy], work.gold) for policy in fixed},
        "answers": {policy: describe(answers[policy], None) for policy in POLICIES},
        "audit": None if verdict is None else verdict.record(),
        "patterns": [pattern.record() for pattern in patterns],
        "fast_pairs": len(read_lines(folder / "fast.jsonl")),
        "comparisons": asked,
        "decisions": decisions,
    }
    for line in decisions:
        log.info("round %d: %s", number, line)
    _write(folder / "round.json", summary)


def describe(answers: Sequence[Answer], gold: Callable[[Answer], float] | None) -> dict[str, Any]:
    """Means over answers: score, audit, signal and gold where known, tokens, share ended; gold by domain too."""
    known = {
        name: mean(value for answer in answers if (value := getattr(answer, name)) is not None)
        for name in ("score", "audit", "signal")
        if any(getattr(answer, name) is not None for answer in answers)
    }
    described: dict[str, Any] = known | {
        "tokens": mean(float(answer.tokens) for answer in answers),
        "ended": mean(float(answer.ended) for answer in answers),
        "answers": len(answers),
    }
    if gold is not None:
        values = [(answer.domain, gold(answer)) for answer in answers]
        described["gold"] = mean(value for _, value in values)
        described["gold_by_domain"] = {
            domain: mean(value for d, value in values if d == domain) for domain in sorted({d for d, _ in values})
        }
    return described


def _scores(work: Work, reward: Path, audit: Path | None) -> Callable[[Sequence[Answer]], list[Answer]]:
    """A function that returns answers with the scores of both models. The models are loaded when first asked."""
    loaded: dict[Path, Score] = {}

    def scored(path: Path, answers: Sequence[Answer]) -> list[float]:
        if path not in loaded:
            loaded[path] = work.scorer(path)
        return loaded[path](answers)

    def score(answers: Sequence[Answer]) -> list[Answer]:
        scores = scored(reward, answers)
        audits = [None] * len(answers) if audit is None else scored(audit, answers)
        signals = [None if work.signal is None else work.signal(answer) for answer in answers]
        return [
            replace(answer, score=a, audit=b, signal=c) for answer, a, b, c in zip(answers, scores, audits, signals)
        ]

    return score


def _collect(
    folder: Path,
    number: int,
    start: Start,
    config: RoundsConfig,
    work: Work,
    score: Callable[[Sequence[Answer]], list[Answer]],
) -> dict[str, list[Answer]]:
    """Answers of the SFT, early and late policies to the round's prompts."""
    answers = {}
    for place, policy in enumerate(POLICIES):
        file = folder / "answers" / f"{policy}.jsonl"
        if not file.exists():
            early, late = work.checkpoints(folder / "policy")
            weights = {"sft": start.sft, "early": early, "late": late}[policy]
            asked = [replace(prompt, policy=policy) for prompt in work.prompts(number)]
            write_answers(file, score(work.answers(weights, asked, start.seed + 10 * number + place)))
        answers[policy] = read_answers(file)
    return answers


def _answer_fixed(
    folder: Path, start: Start, work: Work, score: Callable[[Sequence[Answer]], list[Answer]]
) -> dict[str, list[Answer]]:
    """Answers of the SFT and the last policy to the held-out prompts, with the same random numbers in every round."""
    answers = {}
    for policy in ("sft", "late"):
        file = folder / f"fixed_{policy}.jsonl"
        if not file.exists():
            weights = start.sft if policy == "sft" else work.checkpoints(folder / "policy")[1]
            asked = [replace(prompt, policy=policy) for prompt in work.fixed_prompts]
            write_answers(file, score(work.answers(weights, asked, start.seed)))
        answers[policy] = read_answers(file)
    return answers


def _best_of(folder: Path, start: Start, config: RoundsConfig, work: Work, gold: Callable[[Answer], float]) -> None:
    """Score and gold reward of the best of n answers of the SFT policy, by the round's reward model."""
    samples = config.best_of.samples
    prompts = [replace(prompt, policy="sft") for prompt in work.fixed_prompts[: config.best_of.prompts]]
    drawn = work.answers(start.sft, [prompt for prompt in prompts for _ in range(samples)], start.seed)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    scores, values = work.scorer(Path(manifest["reward_model"]))(drawn), [gold(answer) for answer in drawn]
    groups = [slice(place, place + samples) for place in range(0, len(drawn), samples)]
    rows = [
        {"n": n, "kl": best_of_kl(n)}
        | {
            name: mean(expected_best_of(scores[group], of[group], n) for group in groups)
            for name, of in (("score", scores), ("gold", values))
        }
        for n in powers_of_two(samples)
    ]
    _write(folder / "best_of.json", rows)


def _audit_verdict(answers: dict[str, list[Answer]], config: RoundsConfig) -> AuditVerdict:
    def scores(policy: str) -> tuple[list[float], list[float]]:
        return [a.score or 0.0 for a in answers[policy]], [a.audit or 0.0 for a in answers[policy]]

    return judge(scores("sft"), scores("late"), config.audit)


def _fast_path(
    folder: Path,
    answers: dict[str, list[Answer]],
    config: RoundsConfig,
    score: Callable[[Sequence[Answer]], list[Answer]],
) -> list[Pattern]:
    """Detect what the round learned to exploit and write fast.jsonl."""

    def rescore(some: Sequence[Answer]) -> tuple[list[float], list[float] | None]:
        scored = score(some)
        audits = [answer.audit for answer in scored]
        return [a.score or 0.0 for a in scored], None if None in audits else [b or 0.0 for b in audits]

    early, late = answers["early"], answers["late"]
    found, pairs = detect(early, late, config.hacks, rescore), []
    for pattern in found:
        made = patches(pattern, early, late, config.hacks) if pattern.patch else []
        pairs += made
        log.info("%s%s (%s)", pattern.summary, f": {len(made)} pairs" if pattern.patch else "", pattern.verdict)
        if pattern.patch and len(made) < config.hacks.fewest_pairs:
            log.warning("only %d pairs could be made against %s %s", len(made), pattern.name, pattern.detail)
    _write(folder / "hacks.json", [pattern.record() for pattern in found])
    write_lines(folder / "fast.jsonl", pairs)
    return found


def _decisions(
    number: int, config: RoundsConfig, verdict: AuditVerdict | None, patterns: Sequence[Pattern], asked: int
) -> list[str]:
    """What the round leads to, in words."""
    lines = [f"alarm: {reason}" for reason in verdict.reasons] if verdict is not None else []
    if verdict is not None and not verdict.alarm:
        lines.append("the audit model raises no alarm")
    patched = [f"{p.name} {p.detail}".strip() for p in patterns if p.patch]
    lines.append(f"patched: {', '.join(patched)}" if patched else "no pattern to patch")
    if asked:
        lines.append(f"{asked} comparisons of the SFT, early and late policies' answers are up for annotation")
    if number < config.count:
        where = "the SFT policy" if config.start == "sft" else "the last policy"
        lines.append(f"the reward model is trained on all data so far; round {number + 1} starts from {where}")
    return lines


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
