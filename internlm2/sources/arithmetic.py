"""Questions whose answer a rule can check, made from (seed, split, index): prompts for verifiable rewards without a
download.

Small sums that a small chat model gets right some of the time: a success rate between 0 and 1 is what policy gradients
live on.
"""

from random import Random
from typing import Any

from internlm2.permutation import derive_key

_ASK = ("What is {}?", "Calculate {}.", "How much is {}?", "Compute {}.", "Please work out {}.")
_BRIEF = "Answer with the number alone."
_NAMES = ("Anna", "Ben", "Chen", "Dora", "Emil", "Farah")
_THINGS = ("apples", "books", "coins", "pens", "shells", "stamps")


def prompt_record(seed: int, split: str, index: int) -> dict[str, Any]:
    """{prompt, answer, domain}; sums, differences and products, one in four as a story."""
    rng = Random(derive_key("arithmetic", seed, split, index))  # only .random(), which no version of Python changes
    kind = int(rng.random() * 4)
    a, b = 1 + int(rng.random() * 19), 1 + int(rng.random() * 19)
    if kind == 0:
        question, answer = _pick(_ASK, rng).format(f"{a} + {b}"), a + b
    elif kind == 1:
        a, b = max(a, b), min(a, b)
        question, answer = _pick(_ASK, rng).format(f"{a} - {b}"), a - b
    elif kind == 2:
        a, b = 2 + a % 9, 2 + b % 9
        question, answer = _pick(_ASK, rng).format(f"{a} * {b}"), a * b
    else:
        name, things = _pick(_NAMES, rng), _pick(_THINGS, rng)
        question = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"
        answer = a + b
    return {"prompt": f"{question} {_BRIEF}", "answer": str(answer), "domain": "math"}


def _pick(items: tuple[str, ...], rng: Random) -> str:
    return items[int(rng.random() * len(items))]
