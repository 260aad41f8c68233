"""Answers of the current policy to prompts: what is asked, what was drawn, and with which probabilities.

Lengths come from the sampler alone: an answer's tokens are exactly those that were drawn, its end included, and nothing
after it exists. A pad id therefore has no meaning anywhere in this room.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from internlm2.config import ConfigError
from internlm2.data.prompts import Prompt, PromptStream
from internlm2.generation.engine import Completion
from internlm2.generation.parameters import SamplingParams
from internlm2.permutation import derive_key
from internlm2.text.chat import Message, parse_reply, render
from internlm2.text.tokenizer import Tokenizer

# Prompts that may be passed over for their length, for each that is taken, before the limit is taken to be a mistake.
_MOST_SKIPPED = 1000


class Sampler(Protocol):
    """What draws answers: `internlm2.generation.Engine`, or another engine behind the same methods."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        row_ids: Sequence[int] | None = None,
    ) -> list[Completion]:
        """All answers, prompt by prompt and sample by sample."""
        ...

    def refresh(self) -> None:
        """Take over the policy's weights after an update, and drop everything that was computed with the old ones."""
        ...

    def release(self) -> None:
        """Nothing is drawn until the next `refresh`: free what it would make anew."""
        ...


@dataclass(frozen=True)
class Question:
    """A prompt as the policy reads it: its place in the stream, and its tokens up to `<|im_start|>assistant\\n`."""

    position: int
    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class Rollout:
    """One answer. Log-probabilities are natural, one a token: `logprobs` of the sampler's softmax at temperature 1,
    `sampling_logprobs` of the tempered and truncated distribution that the token was drawn from.
    """

    question: Question
    sample: int
    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish: str  # stop: it ended its turn; length: it was cut
    reply: Message = field(default_factory=lambda: Message("assistant", ""))

    @property
    def ended(self) -> bool:
        return self.finish == "stop"


@dataclass(frozen=True)
class Sample:
    """What a reward function sees of an answer. `reply` is the turn, `text` its content."""

    prompt: Prompt
    text: str
    tokens: list[int]
    finish: str
    reply: Message


def take_questions(
    stream: PromptStream, position: int, count: int, tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[Question], int]:
    """The next `count` prompts from `position` on that have at most `max_tokens` tokens, and the position after them.

    Longer ones are passed over: cutting a prompt would ask another question. The same on every rank.
    """
    taken: list[Question] = []
    start, limit = position, position + _MOST_SKIPPED * count
    while len(taken) < count:
        if position >= limit:
            raise ConfigError(
                f"ppo.rollout.max_prompt_tokens={max_tokens}: of {limit - start:,} prompts only {len(taken)} are that "
                "short. Raise it, or choose other prompts."
            )
        question = ask(stream[position], position, tokenizer)
        position += 1
        if len(question.ids) <= max_tokens:
            taken.append(question)
    return taken, position


def ask(prompt: Prompt, position: int, tokenizer: Tokenizer) -> Question:
    """The prompt in the chat format. No condition of a reward model is part of it."""
    return Question(position, prompt, render(prompt.turns, tokenizer, generation_prompt=True).ids)


def collect(
    sampler: Sampler, questions: Sequence[Question], params: SamplingParams, tokenizer: Tokenizer
) -> list[Rollout]:
    """`params.n` answers to each question, question by question.

    A draw depends on `params.seed` and on the prompt's place in the stream, not on what is drawn beside it: any number
    of ranks draws the same answers.
    """
    drawn = sampler.generate([q.ids for q in questions], params, row_ids=[q.position for q in questions])
    return [
        Rollout(
            questions[answer.prompt],
            answer.sample,
            answer.tokens,
            answer.logprobs,
            answer.sampling_logprobs,
            answer.finish or "length",
            parse_reply(answer.tokens, tokenizer),
        )
        for answer in drawn
    ]


def rollout_seed(seed: int, purpose: str, iteration: int) -> int:
    """The sampler's key for one iteration."""
    return derive_key(seed, purpose, iteration)


def as_sample(rollout: Rollout) -> Sample:
    """What a reward function is shown."""
    return Sample(rollout.question.prompt, rollout.reply.content, rollout.tokens, rollout.finish, rollout.reply)
