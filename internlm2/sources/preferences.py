"""Records of preferences -> a prompt and answers with scores, in the usual formats.

    pair       {"prompt", "chosen", "rejected", "domain"?, "margin"?}; each side is a text, a turn or turns, or a list
               of texts: every one that was chosen then stands above every one that was rejected
    dialogs    {"chosen", "rejected"} as whole conversations, which begin alike: lists of turns, or Anthropic's
               "\\n\\nHuman: ...\\n\\nAssistant: ..." text
    ranking    {"prompt", "ranked": [best, ..., worst]}, or {"prompt", "answers": [...], "ranks": [1, 2, ...]} (1: best)
    ratings    {"prompt", "answers": [...], "ratings": [...]}, or answers that are {"text" or "content", "rating"}
               (higher is better; equal ratings make no pair)

    graded     {"question", NAME: {"solution", "is_correct"}, ...}: every right solution above every wrong one

The prompt is a text, or turns in the formats of `internlm2.sources.conversations`; `question` and `instruction` (with
`input`) are read as well, and `conversations` as LLaMA-Factory writes it. `domain` says by which standards the answers
were compared. A record that cannot be used raises RecordError.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internlm2.sources.conversations import turns_of
from internlm2.sources.documents import Answer, Document, RecordError
from internlm2.text.chat import Message

# Raise when a change below alters what a record becomes: cached shards of the old kind are then not used.
FORMAT = 1

_SPOKEN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True, slots=True)
class PreferenceReader:
    """Turns records into documents with answers; `domain` is that of records which name none."""

    domain: str

    def document(self, file: str, line: int, record: Any) -> Document:
        """The record that stands at file:line. Raises RecordError."""
        if not isinstance(record, dict):
            raise RecordError("a preference must be an object with a prompt and answers")
        record = {key: value for key, value in record.items() if value is not None}
        domain = record.get("domain", self.domain)
        if not isinstance(domain, str) or not domain:
            raise RecordError(f"domain must be a name, not {domain!r}")
        prompt, answers = _compared(record)
        return comparison(file, line, prompt, answers, domain)


def comparison(
    file: str,
    line: int,
    prompt: Sequence[Message],
    answers: Sequence[Answer],
    domain: str,
    split_key: str | None = None,
) -> Document:
    """A document of answers to compare. Raises RecordError where no two of them differ in score.

    Held out by what was asked (`split_key` may say otherwise), so that answers to one question never lie on both sides.
    """
    if len({answer.score for answer in answers}) < 2:
        raise RecordError("no answer is better than another: there is nothing to learn from")
    question = next((turn.content for turn in prompt if turn.role == "user"), None)
    if split_key is None and question is not None:
        split_key = f"asked:{question}"
    return Document(file, line, split_key=split_key, messages=tuple(prompt), answers=tuple(answers), domain=domain)


def _compared(record: dict[str, Any]) -> tuple[tuple[Message, ...], list[Answer]]:
    if "chosen" in record and "rejected" in record:
        return _two_sides(record)
    prompt = _prompt(record)
    if prompt is None:
        raise RecordError(f"no prompt among the keys {', '.join(sorted(record))}")
    if "ranked" in record:
        answers = _list(record, "ranked")
        return prompt, _scored(answers, [float(-place) for place in range(len(answers))])
    graded = [value for value in record.values() if isinstance(value, dict) and "is_correct" in value]
    if graded:
        return prompt, _scored([value.get("solution") for value in graded], [float(v["is_correct"]) for v in graded])
    if "answers" not in record:
        raise RecordError("no answers: give chosen and rejected, ranked, or answers with ranks or ratings")
    answers = _list(record, "answers")
    if "ranks" in record:
        return prompt, _scored(answers, [-rank for rank in _numbers(record, "ranks", len(answers))])
    if "ratings" in record:
        return prompt, _scored(answers, _numbers(record, "ratings", len(answers)))
    ratings = [answer.get("rating") if isinstance(answer, dict) else None for answer in answers]
    return prompt, _scored(answers, _numbers({"ratings": ratings}, "ratings", len(answers)))


def _two_sides(record: dict[str, Any]) -> tuple[tuple[Message, ...], list[Answer]]:
    (margin,) = _numbers({"margin": [record.get("margin", 1.0)]}, "margin", 1)
    if margin <= 0:
        raise RecordError(f"margin must be above 0, not {margin:g}")
    prompt, sides = _prompt(record), {}
    for side in ("chosen", "rejected"):
        value = record[side]
        several = isinstance(value, list) and bool(value) and not isinstance(value[0], dict)
        sides[side] = [_turns(answer, side) for answer in (value if several else [value])]
    if prompt is None:
        prompt = _common_beginning([*sides["chosen"], *sides["rejected"]])
    answers = []
    for side, score in (("chosen", margin), ("rejected", 0.0)):
        for turns in sides[side]:
            # Many sets repeat the prompt in both sides.
            rest = turns[len(prompt) :] if len(turns) > len(prompt) and turns[: len(prompt)] == prompt else turns
            answers.append(Answer(_checked(rest, side), score))
    return prompt, answers


def _prompt(record: dict[str, Any]) -> tuple[Message, ...] | None:
    for key in ("prompt", "question", "instruction", "messages", "conversations"):
        if key not in record:
            continue
        value = record[key]
        if key == "instruction" and isinstance(value, str) and record.get("input"):
            value = f"{value}\n{record['input']}"
        turns = (Message("user", value),) if isinstance(value, str) else turns_of(value)
        if isinstance(value, str) and not value.strip():
            raise RecordError(f"{key} is empty")
        if not turns or turns[-1].role == "assistant":
            raise RecordError(f"{key} must end with what the answers answer, not with the assistant")
        opening = record.get("system")
        return (Message("system", opening), *turns) if isinstance(opening, str) and opening.strip() else turns
    return None


def _turns(value: Any, what: str) -> tuple[Message, ...]:
    """Turns of an answer, or of a whole conversation."""
    if isinstance(value, str):
        _check_text(value, what)
        parts = _SPOKEN.split(value)
        if len(parts) > 1 and not parts[0].strip():
            names = {"Human": "user", "Assistant": "assistant"}
            return tuple(Message(names[name], text.strip()) for name, text in zip(parts[1::2], parts[2::2]))
        return (Message("assistant", value),)
    if isinstance(value, dict) and not {"role", "from"} & value.keys():
        text = value.get("text", value.get("content"))
        if not isinstance(text, str):
            raise RecordError(f"{what} has no text")
        return _turns(text, what)
    if value is None:
        raise RecordError(f"{what} has no text")
    return turns_of([value] if isinstance(value, dict) else value)


def _scored(answers: list[Any], scores: Sequence[float]) -> list[Answer]:
    return [
        Answer(_checked(_turns(answer, f"answer {number}"), f"answer {number}"), score)
        for number, (answer, score) in enumerate(zip(answers, scores), start=1)
    ]


def _checked(turns: tuple[Message, ...], what: str) -> tuple[Message, ...]:
    if not turns or turns[-1].role != "assistant":
        raise RecordError(f"{what} must end with a turn of the assistant")
    if not turns[-1].plain_text.strip():
        raise RecordError(f"{what} is empty")
    return turns


def _common_beginning(sides: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    shortest = min(sides, key=len)
    length = next((i for i, turn in enumerate(shortest) if any(side[i] != turn for side in sides)), len(shortest) - 1)
    while length and shortest[length - 1].role == "assistant":
        length -= 1
    if not length:
        raise RecordError("no prompt, and the two sides do not begin alike")
    return shortest[:length]


def _list(record: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(record[key], list) or len(record[key]) < 2:
        raise RecordError(f"{key} must be a list of at least two answers")
    return record[key]


def _numbers(record: dict[str, Any], key: str, count: int) -> list[float]:
    values = record[key]
    if not isinstance(values, list) or len(values) != count:
        raise RecordError(f"{key} must be a list of {count} numbers, one for each answer")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RecordError(f"{key}: {value!r} is no number")
    return [float(value) for value in values]


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{what}: a lone surrogate at character {error.start} is no valid Unicode") from error
