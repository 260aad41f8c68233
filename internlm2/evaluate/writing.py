"""Texts that a model writes: many prompts together, each ended by a stop token, a stop text or a length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from internlm2.generation import Completion, Engine, SamplingParams
from internlm2.text.tokenizer import Tokenizer

# Tokens at the end of an answer in which a stop text is looked for: each stands for at least one byte of it.
TAIL = 24


@dataclass(frozen=True)
class Written:
    """One text, cut before its stop text; `finish` is stop or length."""

    prompt: int
    sample: int
    text: str
    tokens: int
    finish: str


def write(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_texts: Sequence[str] = (),
) -> list[Written]:
    """One text for each prompt and sample, prompt by prompt. A row whose text holds a stop text leaves at once."""
    each = [replace(params, max_new_tokens=_room(engine, len(prompt), params)) for prompt in prompts]
    completions: list[Completion] = []
    for index, prompt in enumerate(prompts):
        completions += engine.submit(prompt, each[index], index=index)
    while engine.busy:
        ended = [
            token.completion
            for token in engine.step()
            if stop_texts and not token.finish and _stopped(token.completion, tokenizer, stop_texts)
        ]
        engine.stop(ended)
    texts = []
    for completion in completions:
        text = tokenizer.decode(completion.tokens, skip_special=True)
        cut = min((place for stop in stop_texts if (place := text.find(stop)) >= 0), default=len(text))
        texts.append(
            Written(completion.prompt, completion.sample, text[:cut], len(completion.tokens), completion.finish or "")
        )
    return texts


def _stopped(completion: Completion, tokenizer: Tokenizer, stop_texts: Sequence[str]) -> bool:
    tail = tokenizer.decode(completion.tokens[-TAIL:], skip_special=True)
    return any(stop in tail for stop in stop_texts)


def _room(engine: Engine, prompt: int, params: SamplingParams) -> int:
    """New tokens that fit after a prompt; at least one is asked for, so that the engine names a prompt too long."""
    return max(1, min(params.max_new_tokens, engine.max_length - prompt))
