"""What a change between the early and the late answers of a round is, and the text statistics that tell."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Pattern:
    """A change between the early and the late answers of a round.

    `evidence` holds the figures behind `summary`. `shown_by`: places of the late answers that show it. `patch`: whether
    pairs are made against it, for the reason that `verdict` gives.
    """

    name: str
    detail: str
    summary: str
    evidence: dict[str, float | None]
    shown_by: tuple[int, ...]
    patch: bool
    verdict: str

    def record(self) -> dict[str, Any]:
        """As JSON, with the number of answers in place of their places."""
        return asdict(self) | {"shown_by": len(self.shown_by)}


def ngrams(words: Sequence[str], ngram: int) -> list[tuple[str, ...]]:
    """Every n-gram of a text, in order."""
    return [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]


def repeated_share(text: str, ngram: int) -> float:
    """Share of a text's n-grams of words that were said before in it."""
    grams = ngrams(text.split(), ngram)
    return 0.0 if not grams else 1.0 - len(set(grams)) / len(grams)


def distinct_share(texts: Sequence[str], ngram: int) -> float:
    """Different n-grams in all texts over their number (distinct-n, Li et al. 1510.03055)."""
    grams = [gram for text in texts for gram in ngrams(text.split(), ngram)]
    return 1.0 if not grams else len(set(grams)) / len(grams)


def mean(values: Iterable[float]) -> float:
    """The mean; 0 of nothing."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


def two_errors(values: Iterable[float]) -> float:
    """Two standard errors of the mean; infinite for fewer than two numbers."""
    numbers = list(values)
    if len(numbers) < 2:
        return math.inf
    middle = mean(numbers)
    return 2.0 * math.sqrt(sum((value - middle) ** 2 for value in numbers) / (len(numbers) - 1) / len(numbers))
