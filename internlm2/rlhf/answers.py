"""Answers that policies gave to prompts, as the steps between two rounds look at them: on disk one JSON line each."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from internlm2.run.atomic import replace_text
from internlm2.text.chat import Message


@dataclass(frozen=True, slots=True)
class Answer:
    """One policy's answer to one prompt.

    `policy`: sft, early or late (checkpoints of one round). `reference` holds what the prompt's record says besides,
    for rules. `score` is of the reward model that the round optimises,
    `audit` of the one that it does not see, `signal` of a validation rule; each None where nobody asked for it.
    """

    prompt: tuple[Message, ...]
    domain: str
    text: str
    tokens: int
    ended: bool
    policy: str
    score: float | None = None
    audit: float | None = None
    signal: float | None = None
    reference: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The text at its white space."""
        return self.text.split()

    @property
    def question(self) -> str:
        """What the user said last."""
        return next((turn.content for turn in reversed(self.prompt) if turn.role == "user"), "")

    def with_text(self, text: str) -> "Answer":
        """The same prompt with another text, not scored yet; its tokens are estimated from its words."""
        tokens = round(self.tokens * len(text.split()) / max(1, len(self.words)))
        return replace(self, text=text, tokens=tokens, score=None, audit=None, signal=None)


def messages_record(turns: Sequence[Message]) -> list[dict[str, str]]:
    """Turns as JSON, in the form that prompt and preference files have."""
    return [{"role": turn.role, "content": turn.content} | ({"name": turn.name} if turn.name else {}) for turn in turns]


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write JSON lines, whole or not at all."""
    write_lines(path, (_record(answer) for answer in answers))


def read_answers(path: Path) -> list[Answer]:
    """Read what `write_answers` wrote."""
    found = []
    for record in read_lines(path):
        prompt = tuple(Message(turn["role"], turn["content"], turn.get("name")) for turn in record.pop("prompt"))
        found.append(Answer(prompt=prompt, **record))
    return found


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. ValueError names the file and line of what is none."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number} must be an object, not {type(record).__name__}")
        records.append(record)
    return records


def _record(answer: Answer) -> dict[str, Any]:
    names = ("domain", "text", "tokens", "ended", "policy", "score", "audit", "signal", "reference")
    return {"prompt": messages_record(answer.prompt)} | {name: getattr(answer, name) for name in names}
