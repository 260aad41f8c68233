"""Supervised fine-tuning (report 4.1): ChatML conversations, loss on what the assistant says and on its end of turn.

CPU         python train.py stage=sft model=tiny preset=demo
real model  python train.py stage=sft model=smollm2_135m preset=demo init_from=smollm2 adapter=lora name=smollm2
one GPU     python train.py stage=sft model=7b data=my_dialogs init_from=/path/to/internlm2-7b adapter=qlora
"""

import logging
from typing import Any

import torch
from rich.console import Console

from internlm2.config import Config
from internlm2.data.batch import PackedBatch
from internlm2.engine.base import LossSum
from internlm2.engine.build import build_engine, prepare_device
from internlm2.model.adapters import add_adapters, describe, merged_weights, set_dropout_step
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import load_weights
from internlm2.run.directory import RunDirectory
from internlm2.stages.exporting import export_trained
from internlm2.stages.held_out_answers import HeldOutAnswers, held_out_questions
from internlm2.stages.preparation import load_data, mark_finished, run_job, start_model
from internlm2.stages.pretrain import token_loss
from internlm2.stages.samples import write_answers

log = logging.getLogger(__name__)


def run(config: Config, directory: RunDirectory, console: Console) -> int:
    """One stage: build, resume, train, finish. Returns the exit code: 0, or 128 + the signal that stopped it."""
    device = prepare_device(config.engine)
    data = load_data(config, directory, console)
    model, weights = start_model(CausalLM, config, device, data.tokenizer, directory)
    first_start = not list(directory.samples.glob("*.txt"))
    longest = config.run.sample_tokens
    questions = held_out_questions(data.corpus, list(data.weights), config.validate.answers, longest)
    held_out_answers = HeldOutAnswers(questions, data.tokenizer, longest)
    add_adapters(model, config.adapter, config.seed)
    if config.adapter.kind != "none":
        log.info(describe(model, config.adapter))
    engine = build_engine(model, config.engine, config.optim, config.train.total_steps, weights)

    def answer() -> None:
        with engine.whole():
            if directory.writes:
                samples = plain(model, config)
                write_answers(samples, data.tokenizer, config.run, config.generation, directory, engine.step)
                if questions:
                    held_out_answers.measure(samples, config.generation, engine.step, directory)

    def loss(model: torch.nn.Module, batch: PackedBatch) -> LossSum:
        set_dropout_step(model, engine.step)
        return token_loss(model, batch)

    def validate() -> dict[str, Any]:
        answer()
        return data.held_out.measure(engine, loss)

    if first_start:
        answer()
        if config.validate.compare_with_init:
            before = data.held_out.measure(engine, loss)
            log.info("before training: %s", ", ".join(f"held-out {k} {v['loss']:.4f}" for k, v in before.items()))

    job, stop = run_job(config, directory, console, engine, data.stream, loss, validate)
    if stop.requested is not None:
        return stop.exit_code

    with engine.whole():
        if directory.writes:
            export_trained(model, config, directory)
    mark_finished(job)
    return 0


def plain(model: CausalLM, config: Config) -> CausalLM:
    """The model itself or, with adapters, a copy that has them merged: generation takes plain weights."""
    if config.adapter.kind == "none":
        return model
    weight = model.model.norm.weight
    merged = CausalLM.from_config(config.model, device=weight.device, dtype=weight.dtype, seed=None)
    load_weights(merged, merged_weights(model, config.adapter), "the merged adapter")
    return merged
