"""What a source yields: documents, records that could not be read, and the units of work in which worker processes
read them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from internlm2.text.chat import Message


@dataclass(frozen=True, slots=True)
class Answer:
    """One of several answers to the same prompt: its turns, and how good a judge found it, on the judge's own scale."""

    turns: tuple[Message, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Document:
    """One document: `text`, or a conversation (`messages`; which turns carry loss follows from their roles), or
    `tokens` that another program made (a negative id = no loss on that token), or a prompt (`messages`) with `answers`
    that were compared with each other by the standards of `domain`.

    `file` and `line` say where it stands (line 0: the whole file). Documents of equal `split_key` fall on the same side
    of the hold-out; without a key the content decides.
    """

    file: str
    line: int = 0
    text: str | None = None
    tokens: list[int] | None = None
    split_key: str | None = None
    messages: tuple[Message, ...] | None = None
    answers: tuple[Answer, ...] = ()
    domain: str = ""

    @property
    def plain_text(self) -> str | None:
        """All text in it, for a vocabulary to be learned from; None where only tokens are known."""
        if self.messages is None:
            return self.text
        turns = (*self.messages, *(turn for answer in self.answers for turn in answer.turns))
        return "\n".join(turn.plain_text for turn in turns)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used, where it stands, and why. A `fatal` one stops the run: skipping it would hide a
    wrong config.
    """

    file: str
    line: int
    reason: str
    fatal: bool = False

    @property
    def place(self) -> str:
        """`file:line`, or the file alone where the whole file is meant."""
        return f"{self.file}:{self.line}" if self.line else self.file


class RecordError(ValueError):
    """The text of this error is the reason of a `BadRecord`."""


class Unit(Protocol):
    """A piece of a source that one worker process reads and tokenizes: small enough to send, independent of all others.

    `documents` sets `lines` to the number of lines read where line numbers count from the start of the unit, else
    leaves it 0.
    """

    name: str  # the file that line numbers belong to; empty where there are several
    size: int  # bytes of input, for the progress bar
    lines: int

    def documents(self) -> Iterator[Document | BadRecord]:
        """Read the unit."""
        ...


@dataclass(slots=True)
class MemoryUnit:
    """Documents that are already in memory."""

    items: list[Document]
    size: int
    lines: int = 0
    name: str = ""

    def documents(self) -> Iterator[Document | BadRecord]:
        """The documents in their order."""
        yield from self.items
