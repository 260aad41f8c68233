"""What the model writes, for a person to read."""

import logging

from internlm2.config import RunConfig
from internlm2.data.tokenizer import Tokenizer
from internlm2.generation.engine import Engine
from internlm2.generation.parameters import SamplingParams
from internlm2.model.transformer import CausalLM
from internlm2.run.directory import RunDirectory

log = logging.getLogger(__name__)

TEMPERATURE, TOP_P = 0.8, 0.8  # the chat defaults of the released models


def write_samples(
    model: CausalLM, tokenizer: Tokenizer, settings: RunConfig, seed: int, run: RunDirectory, step: int
) -> None:
    """Complete each prompt of `run.samples`; to the log and to samples/."""
    if not settings.samples:
        return
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in settings.samples]
    params = SamplingParams(
        temperature=TEMPERATURE,
        top_p=TOP_P,
        max_new_tokens=settings.sample_tokens,
        stop_ids=(tokenizer.eos_id,),
        seed=seed,
    )
    answers = sorted(Engine(model).generate(prompts, params), key=lambda answer: answer.prompt)
    texts = []
    for prompt, answer in zip(settings.samples, answers):
        text = tokenizer.decode(answer.tokens, skip_special=True)
        texts.append(f"{prompt}⟶{text}")
        log.info("sample of step %d (the prompt ends at ⟶):\n%s", step, texts[-1])
    run.samples.mkdir(exist_ok=True)
    (run.samples / f"step_{step:08d}.txt").write_text("\n\n----\n\n".join(texts) + "\n", encoding="utf-8")
