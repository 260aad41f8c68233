"""Answers with what was thought of them, as JSON lines: for people, and for whoever makes new preference pairs."""

import json
from collections.abc import Sequence

from internlm2.rlhf.measure import AnswerNumbers
from internlm2.rlhf.rollout import Rollout
from internlm2.run.atomic import replace_text
from internlm2.run.directory import RunDirectory


def keep_rollouts(run: RunDirectory, name: str, rollouts: Sequence[Rollout], numbers: AnswerNumbers) -> None:
    """Write samples/<name>.jsonl: {prompt, domain, ..., answer, score, reward, kl, length, finish}, one answer a line.

    `rollouts_<iteration>` are the training answers of an iteration; `validation_<iteration>` those to the held-out
    prompts, which are the same in every iteration: early and late policies can be compared prompt by prompt.
    """
    if not run.writes:
        return
    run.samples.mkdir(exist_ok=True)
    lines = []
    for row, rollout in enumerate(rollouts):
        facts = {
            "answer": rollout.reply.content,
            "score": numbers.scores[row].item(),
            "reward": numbers.shaped[row].item(),
            "kl": numbers.kl[row].item(),
            "length": len(rollout.tokens),
            "finish": rollout.finish,
            "position": rollout.question.position,
            "sample": rollout.sample,
        }
        record = rollout.question.prompt.record()
        reference = {key: value for key, value in record.items() if key not in ("prompt", "domain")}
        kept = {"prompt": record["prompt"], "domain": record["domain"], "reference": reference, **facts}
        if numbers.gold is not None:
            kept["gold"] = numbers.gold[row].item()
        lines.append(json.dumps(kept, ensure_ascii=False))
    replace_text(run.samples / f"{name}.jsonl", "\n".join(lines) + "\n")


def readable(rollouts: Sequence[Rollout], numbers: AnswerNumbers, count: int) -> str:
    """A few answers for the report."""
    texts = []
    for row, rollout in enumerate(rollouts[:count]):
        asked = "\n".join(f"{turn.role}: {turn.content}" for turn in rollout.question.prompt.turns)
        ending = "" if rollout.ended else " [...]"
        texts.append(f"{asked}\nassistant: {rollout.reply.content}{ending}\nscore {numbers.scores[row].item():.3f}")
    return "\n\n----\n\n".join(texts) + "\n"
