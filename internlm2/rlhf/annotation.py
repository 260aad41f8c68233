"""The slow path (report 4.2.2): answers of the SFT, early and late policies, compared by somebody outside of training.

An annotator says for each comparison which answer is better, or nothing yet. People work through files; a function
(such as the exact formula of the toy language), a reward model and a model behind an endpoint answer at once.
"""

import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Protocol

from internlm2.config import ConfigError
from internlm2.permutation import derive_key
from internlm2.rlhf.answers import Answer, messages_record, read_lines, write_lines
from internlm2.text.chat import Message

FIRST, SECOND, TIE = "first", "second", "tie"
REQUESTS, LABELS = "requests.jsonl", "labels.jsonl"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt, in an order that does not tell which policy wrote which."""

    id: str
    prompt: tuple[Message, ...]
    domain: str
    first: Answer
    second: Answer

    def request(self) -> dict[str, Any]:
        """What an annotator sees: no policies, no scores."""
        return {
            "id": self.id,
            "prompt": messages_record(self.prompt),
            "domain": self.domain,
            "first": self.first.text,
            "second": self.second.text,
        }

    def preference(self, better: str) -> dict[str, Any] | None:
        """The preference record of a label; None for a tie."""
        if better == TIE:
            return None
        chosen, rejected = (self.first, self.second) if better == FIRST else (self.second, self.first)
        return {
            "prompt": messages_record(self.prompt),
            "chosen": chosen.text,
            "rejected": rejected.text,
            "domain": self.domain,
            "chosen_by": chosen.policy,
            "rejected_by": rejected.policy,
        }


class Annotator(Protocol):
    """Labels `first`, `second` or `tie` for each comparison; None where there is no label (yet)."""

    def __call__(self, comparisons: Sequence[Comparison]) -> list[str | None]:
        """One label for each comparison, in order."""
        ...


def compare(answers: Sequence[Answer], count: int, seed: int, name: str) -> list[Comparison]:
    """At most `count` comparisons of different answers to the same prompt and domain, in a random order. Empty answers
    are left out: no reader of preferences takes them.

    Every two answers to a prompt may be compared, those of one policy too; a prompt gives a second comparison only
    after each gave one. `name` begins the ids.
    """
    groups: dict[tuple[Any, ...], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.prompt, answer.domain), []).append(answer)
    ranked: list[tuple[int, float, Answer, Answer]] = []
    for number, group in enumerate(groups.values()):
        rng = Random(derive_key(seed, "comparisons", name, number))
        texts: dict[str, Answer] = {}
        for answer in group:
            if answer.text.strip():
                texts.setdefault(answer.text, answer)
        pairs = sorted(combinations(texts.values(), 2), key=lambda pair: rng.random())
        for turn, (one, other) in enumerate(pairs):
            swap = rng.random() < 0.5
            ranked.append((turn, rng.random(), *((other, one) if swap else (one, other))))
    ranked.sort(key=lambda entry: entry[:2])
    return [
        Comparison(f"{name}-{place:05}", first.prompt, first.domain, first, second)
        for place, (_, _, first, second) in enumerate(ranked[:count])
    ]


@dataclass(frozen=True)
class FunctionAnnotator:
    """Prefers what a function scores higher, with Bradley-Terry noise: P(first) = sigmoid((a - b) / temperature)."""

    score: Callable[[Answer], float]
    temperature: float
    seed: int

    def __call__(self, comparisons: Sequence[Comparison]) -> list[str | None]:
        """One label for each comparison; at temperature 0 equal scores are a tie."""
        return [self._label(comparison) for comparison in comparisons]

    def _label(self, comparison: Comparison) -> str:
        difference = self.score(comparison.first) - self.score(comparison.second)
        if self.temperature <= 0:
            return TIE if difference == 0 else FIRST if difference > 0 else SECOND
        chance = 1.0 / (1.0 + math.exp(-max(-500.0, min(500.0, difference / self.temperature))))
        return FIRST if Random(derive_key(self.seed, "label", comparison.id)).random() < chance else SECOND


@dataclass(frozen=True)
class FileAnnotator:
    """People: writes requests.jsonl {id, prompt, domain, first, second} and reads labels.jsonl {id, better}, `better`
    being first, second or tie. What has not come back has no label.
    """

    folder: Path

    def __call__(self, comparisons: Sequence[Comparison]) -> list[str | None]:
        """Labels that are there by now. ValueError for a line that is no label or is about no request."""
        requests = self.folder / REQUESTS
        if not requests.exists():
            write_lines(requests, (comparison.request() for comparison in comparisons))
        labels = self.folder / LABELS
        if not labels.exists():
            return [None] * len(comparisons)
        known = {comparison.id for comparison in comparisons}
        found: dict[str, str] = {}
        for number, record in enumerate(read_lines(labels), start=1):
            if record.get("id") not in known:
                raise ValueError(f"{labels}: label {number} is about {record.get('id')!r}, which was never asked")
            if record.get("better") not in (FIRST, SECOND, TIE):
                raise ValueError(
                    f"{labels}: {record['id']} has better={record.get('better')!r}: write first, second or tie"
                )
            found[record["id"]] = record["better"]
        return [found.get(comparison.id) for comparison in comparisons]


@dataclass(frozen=True)
class ScoreAnnotator:
    """A reward model that is stronger than the one in training: prefers what it scores higher."""

    score: Callable[[Sequence[Answer]], list[float]]

    def __call__(self, comparisons: Sequence[Comparison]) -> list[str | None]:
        """One label for each comparison; equal scores are a tie."""
        scores = self.score([answer for pair in comparisons for answer in (pair.first, pair.second)])
        return [TIE if a == b else FIRST if a > b else SECOND for a, b in zip(scores[::2], scores[1::2])]


@dataclass(frozen=True)
class EndpointAnnotator:
    """A model behind an OpenAI-compatible `/chat/completions` endpoint. `criteria` says for each domain what counts."""

    url: str
    model: str
    criteria: dict[str, str]
    timeout: float = 120.0

    def __call__(self, comparisons: Sequence[Comparison]) -> list[str | None]:
        """One label for each comparison; None where the model named none. ConfigError if it cannot be asked."""
        return [self._label(comparison) for comparison in comparisons]

    def _label(self, comparison: Comparison) -> str | None:
        prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in comparison.prompt)
        criterion = self.criteria.get(comparison.domain, "")
        text = (
            f"{criterion}\nWhich of two answers is better? Reply with one word: first, second or tie.\n\n"
            f"Conversation:\n{prompt}\n\nFirst answer:\n{comparison.first.text}\n\n"
            f"Second answer:\n{comparison.second.text}\n"
        )
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": text.strip()}]}
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                reply = json.load(response)["choices"][0]["message"]["content"]
        except (urllib.error.URLError, OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"rounds.annotation.endpoint={self.url} gave no answer that can be read: {error}"
            ) from error
        named = set(re.findall(r"\b(first|second|tie)\b", str(reply).lower()))
        return named.pop() if len(named) == 1 else None
