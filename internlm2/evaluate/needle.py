"""Needle in a haystack: is a sentence found again, wherever it stands in a prompt of a given length?

Lengths are in the model's own tokens and exact: `<s>`, haystack, needle, question and answer together. All depths of
one repeat share haystack and needle, so that a row of the map differs in the place alone. Greedy, exact match.
"""

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from internlm2.config import ConfigError
from internlm2.generation import Engine, SamplingParams
from internlm2.permutation import derive_key
from internlm2.sources.needles import LANGUAGES, Language, Needle, prose
from internlm2.text.chat import IM_END, IM_START, Message, render
from internlm2.text.tokenizer import Tokenizer

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")


@dataclass(frozen=True)
class Question:
    """One prompt of the map. `depth` in percent of the haystack: 0 is its beginning, 100 its end."""

    language: str
    length: int
    depth: float
    repeat: int
    ids: list[int]
    needle: Needle


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and whether it is the secret word."""

    question: Question
    text: str
    right: bool


@dataclass(frozen=True)
class NeedleMap:
    """Share of right answers by [length][depth], over languages and repeats."""

    lengths: list[int]
    depths: list[float]
    accuracy: list[list[float]]
    asked: list[int]  # in each cell of a length

    def at(self, length: int) -> float:
        """Mean over the depths of one length."""
        row = self.accuracy[self.lengths.index(length)]
        return sum(row) / len(row)


class Haystacks:
    """Makes the prompts of the map for one tokenizer.

    text  prose to hide needles in, instead of the generated; sentences are taken from a random one on, in a circle
    chat  ask as a chat: the haystack and the question are the user's turn
    """

    def __init__(self, tokenizer: Tokenizer, *, chat: bool = False, text: str | None = None) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.sentences = [part for part in SENTENCE_END.split(text) if part.strip()] if text is not None else None
        if self.sentences is not None and not self.sentences:
            raise ConfigError("suite.haystack: the file holds no sentence.")

    def questions(
        self, language: str, length: int, depths: Sequence[float], repeats: int, seed: int
    ) -> Iterator[Question]:
        """`repeats` haystacks of `length` tokens, each with its needle at every depth."""
        words = LANGUAGES[language]
        for repeat in range(repeats):
            key = derive_key("needle question", seed, language, length, repeat)
            needle = words.needle_of(derive_key(key, "needle"))
            before, after = self._frame(words, needle)
            hidden = self.tokenizer.encode(words.space + needle.sentence)
            # A chat answers in a sentence, which should fit into the length as well.
            wanted = needle.sentence if self.chat else needle.answer
            answer = len(self.tokenizer.encode(wanted)) + self.chat
            room = length - len(before) - len(hidden) - len(after) - answer
            if room < 0:
                raise ConfigError(
                    f"suite.lengths: {length} tokens hold no haystack in {language}; needle, question and answer alone "
                    f"take {length - room}."
                )
            hay, starts = self._haystack(words, key, room)
            for depth in depths:
                at = _nearest(starts, depth / 100 * room)
                ids = [*before, *hay[:at], *hidden, *hay[at:], *after]
                yield Question(language, length, depth, repeat, ids, needle)

    def _frame(self, language: Language, needle: Needle) -> tuple[list[int], list[int]]:
        """Ids before the haystack and after it."""
        tokenizer = self.tokenizer
        if not self.chat:
            return [tokenizer.bos_id], tokenizer.encode(language.space + needle.prompt)
        ids = render([Message("user", "")], tokenizer, generation_prompt=True).ids
        if ids[0] == ids[1] == tokenizer.special_ids.get(IM_START):
            ids = ids[1:]  # a vocabulary whose <s> is <|im_start|> itself (SmolLM2) has no extra one
        end = ids.index(tokenizer.special_id(IM_END))
        return ids[:end], [*tokenizer.encode(f"\n\n{needle.question}"), *ids[end:]]

    def _haystack(self, language: Language, key: int, room: int) -> tuple[list[int], list[int]]:
        """Exactly `room` tokens, and the places where a sentence begins. The first sentence is cut to make it fit."""
        pieces: list[list[int]] = []
        total, batch = 0, []
        sentences = self._prose(language, key)
        while total < room:
            batch = [language.space + next(sentences) for _ in range(64)]
            for ids in self.tokenizer.encode_batch(batch):
                if total < room:
                    pieces.append(ids)
                    total += len(ids)
        starts = [0, *(place - (total - room) for place in accumulate(len(piece) for piece in pieces))]
        hay = [token for piece in pieces for token in piece]
        return hay[total - room :], sorted({max(0, place) for place in starts})

    def _prose(self, language: Language, key: int) -> Iterator[str]:
        if self.sentences is None:
            yield from prose(language, key)
        assert self.sentences is not None
        at = key % len(self.sentences)
        while True:
            yield self.sentences[at]
            at = (at + 1) % len(self.sentences)


def ask(engine: Engine, tokenizer: Tokenizer, questions: Sequence[Question], *, chat: bool = False) -> list[Answer]:
    """The model's answers, greedily, in the order of the questions."""
    stops = [tokenizer.eos_id, *(tokenizer.special_ids[name] for name in (IM_END,) if name in tokenizer.special_ids)]
    params = []
    for question in questions:
        words = LANGUAGES[question.language]
        longest = len(tokenizer.encode(question.needle.answer + words.stop)) + (16 if chat else 1)
        params.append(SamplingParams(temperature=0.0, max_new_tokens=longest, stop_ids=stops))
    written = engine.generate([question.ids for question in questions], params)
    texts = [tokenizer.decode(completion.tokens, skip_special=True) for completion in written]
    judge: Callable[[str, str], bool] = says if chat else writes
    return [
        Answer(question, text, judge(text, question.needle.answer))
        for question, text in zip(questions, texts, strict=True)
    ]


def writes(text: str, secret: str) -> bool:
    """Does a completion begin with exactly the secret word?"""
    return re.split(r"[\s.,;:!?\"'”。，；：！？]", text.lstrip(), maxsplit=1)[0] == secret


def says(text: str, secret: str) -> bool:
    """Is a chat's answer the secret word, alone or as a word of one sentence?"""
    if secret.isascii():
        return re.search(rf"\b{re.escape(secret)}\b", text, re.IGNORECASE) is not None
    return secret in text


def needle_map(answers: Sequence[Answer]) -> NeedleMap:
    """Count the answers by length and depth."""
    lengths = sorted({answer.question.length for answer in answers})
    depths = sorted({answer.question.depth for answer in answers})
    cells: dict[tuple[int, float], list[bool]] = {}
    for answer in answers:
        cells.setdefault((answer.question.length, answer.question.depth), []).append(answer.right)
    accuracy = [[sum(cells[length, depth]) / len(cells[length, depth]) for depth in depths] for length in lengths]
    return NeedleMap(lengths, depths, accuracy, [len(cells[length, depths[0]]) for length in lengths])


def _nearest(places: Sequence[int], wanted: float) -> int:
    at = bisect.bisect_left(places, wanted)
    return min(places[max(0, at - 1) : at + 1], key=lambda place: abs(place - wanted))
