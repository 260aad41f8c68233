"""Multiple choice by likelihood: which choice does the model find most likely after the question?"""

from collections.abc import Sequence
from typing import Any

from internlm2.config import ConfigError
from internlm2.config.evaluate import ChoicesSuite
from internlm2.evaluate.intervals import bootstrap
from internlm2.evaluate.item_files import fill, read_items
from internlm2.evaluate.results import Headline, Result
from internlm2.evaluate.scoring import Group, Scored, score
from internlm2.evaluate.subject import Subject


def run(subject: Subject, suite: ChoicesSuite, seed: int) -> list[Result]:
    """Accuracy over a file of questions."""
    items = read_items("suite.path", suite.path, ("question", "choices", "answer"), suite.limit)
    shots = (
        read_items("suite.shots_path", suite.shots_path, ("question", "choices", "answer"), suite.shots)
        if (suite.shots)
        else []
    )
    for place, item in enumerate([*shots, *items], 1):
        check(item, place)
    before = "".join(f"{prompt_of(shot, suite)} {shot['choices'][shot['answer']]}\n\n" for shot in shots)
    groups = [group_of(subject, before + prompt_of(item, suite), item["choices"]) for item in items]
    scored = score(subject.model, groups, batch_tokens=subject.batch_tokens)
    chosen = [best(scores, item["choices"], suite.score) for item, scores in zip(items, scored, strict=True)]
    right = [float(choice == item["answer"]) for choice, item in zip(chosen, items, strict=True)]
    chance = sum(1 / len(item["choices"]) for item in items) / len(items)
    return [
        Result(
            name=suite.name,
            title="Multiple choice by likelihood",
            rows=[{"questions": len(items), "accuracy": sum(right) / len(right), "chance": chance}],
            headline=[Headline(f"{suite.name} accuracy", sum(right) / len(right), bootstrap(right, seed))],
            note=f"{suite.shots} examples before each question; choices compared by score: {suite.score}.",
            records=[
                {
                    "question": item["question"],
                    "answer": item["answer"],
                    "chosen": choice,
                    "logprobs": [part.total for part in scores],
                }
                for item, choice, scores in zip(items, chosen, scored, strict=True)
            ],
        )
    ]


def check(item: dict[str, Any], place: int) -> None:
    """ConfigError where an item's answer names no choice."""
    choices, answer = item["choices"], item["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) for text in choices):
        raise ConfigError(f"suite.path: question {place} needs at least two choices, a list of texts.")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ConfigError(f"suite.path: question {place} has answer {answer!r}; its choices are 0..{len(choices) - 1}.")


def prompt_of(item: dict[str, Any], suite: ChoicesSuite) -> str:
    """The text before a choice."""
    text = fill(suite.template, item, "suite.template")
    return f"{item['context']}\n{text}" if item.get("context") else text


def group_of(subject: Subject, prompt: str, choices: Sequence[str]) -> Group:
    """A question's context and its choices as ids; a choice begins with a space."""
    encoded = subject.tokenizer.encode_batch([prompt, *(f" {choice}" for choice in choices)])
    return Group([*subject.first_ids(), *encoded[0]], encoded[1:])


def best(scores: Sequence[Scored], choices: Sequence[str], how: str) -> int:
    """The most likely choice; the first of equal ones."""
    sizes = {
        "sum": [1] * len(choices),
        "per_byte": [len(choice.encode()) for choice in choices],
        "per_token": [len(scored.logprobs) for scored in scores],
    }[how]
    values = [scored.total / max(1, size) for scored, size in zip(scores, sizes, strict=True)]
    return values.index(max(values))
