"""What the model writes, for a person to read: completions of a base model, answers of a chat model."""

import logging
from collections.abc import Sequence

from internlm2.config import GenerationConfig, RunConfig
from internlm2.generation.build import build_generator
from internlm2.generation.engine import Completion
from internlm2.generation.parameters import SamplingParams
from internlm2.model.transformer import CausalLM
from internlm2.run.directory import RunDirectory
from internlm2.text.chat import Message, parse_reply, render
from internlm2.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TEMPERATURE, TOP_P = 0.8, 0.8  # the chat defaults of the released models


def write_completions(
    model: CausalLM,
    tokenizer: Tokenizer,
    settings: RunConfig,
    generation: GenerationConfig,
    seed: int,
    run: RunDirectory,
    step: int,
) -> None:
    """Complete each prompt of `run.samples`; to the log and to samples/. Only for a rank that writes."""
    if not run.writes:
        return
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in settings.samples]
    params = SamplingParams(
        temperature=TEMPERATURE,
        top_p=TOP_P,
        max_new_tokens=settings.sample_tokens,
        stop_ids=(tokenizer.eos_id,),
        seed=seed,
    )
    texts = []
    for prompt, answer in zip(settings.samples, complete(model, tokenizer, generation, prompts, params)):
        texts.append(f"{prompt}⟶{tokenizer.decode(answer.tokens, skip_special=True)}")
        log.info("sample of step %d (the prompt ends at ⟶):\n%s", step, texts[-1])
    _write(run, step, texts)


def write_answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    settings: RunConfig,
    generation: GenerationConfig,
    run: RunDirectory,
    step: int,
) -> None:
    """Answer each question of `run.samples`, greedily, as a chat; to the log and to samples/. Only for a rank that
    writes.
    """
    if not run.writes:
        return
    questions = [[Message("user", question)] for question in settings.samples]
    prompts = [render(messages, tokenizer, generation_prompt=True).ids for messages in questions]
    stops = (tokenizer.eos_id, tokenizer.special_id("<|im_end|>"))
    params = SamplingParams(temperature=0.0, max_new_tokens=settings.sample_tokens, stop_ids=stops)
    texts = []
    for question, answer in zip(settings.samples, complete(model, tokenizer, generation, prompts, params)):
        reply = parse_reply(answer.tokens, tokenizer).content
        ending = "" if answer.finish == "stop" else " [...]"
        texts.append(f"Q: {question}\nA: {reply}{ending}")
        log.info("step %d\n%s", step, texts[-1])
    _write(run, step, texts)


def complete(
    model: CausalLM,
    tokenizer: Tokenizer,
    generation: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> list[Completion]:
    """One completion of each prompt, in their order; the model returns to the mode that it was in."""
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    answers = build_generator(model, generation, tokenizer.vocab_size).generate(prompts, params)
    model.train(was_training)
    return answers


def _write(run: RunDirectory, step: int, texts: Sequence[str]) -> None:
    if texts:
        run.samples.mkdir(exist_ok=True)
        (run.samples / f"step_{step:08d}.txt").write_text("\n\n----\n\n".join(texts) + "\n", encoding="utf-8")
