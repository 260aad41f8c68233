"""Supervised fine-tuning tokens/s: this engine on packed conversations against TRL's SFTTrainer with packing.

    python benchmarks/sft.py [--model small] [--seq-len 2048] [--rounds 3] [--threads 2] [--clock cpu] [--json FILE]
                             [--trl-from ENVIRONMENT/lib/python3.11/site-packages]

Both sides fine-tune the same shape from random weights on the same dialogs out of the running Python (data=docstrings),
tokenized by the same vocabulary, loss on the answers only, AdamW with clipping at 1.0. Ours: rows of the token stream,
bf16 weights with fp32 masters. TRL: `packing=True` (best fit decreasing) to the same length, `bf16=True` (autocast over
fp32 weights) with scaled-dot-product attention. Tokenizing and packing are done beforehand on both sides. Counted are
the tokens of conversations that went through the model, without padding. `--clock cpu` counts processor seconds: on a
busy machine, with --threads 1, only the ratio means something. TRL is skipped, with its install command, where it is
not installed; `--trl-from` names the site-packages of another environment of the same Python that has it.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from optimizer import OPTIM
from trl_race import (
    CLOCKS,
    STEPS,
    TRAINING,
    Clock,
    Measure,
    arguments,
    llama_config,
    placeholder_tokenizer,
    race,
    report,
    step_times,
    trl_is_here,
)

from internlm2.config import ModelConfig, SourceConfig
from internlm2.config.compose import load_group
from internlm2.data.corpus import Corpus
from internlm2.data.rows import IGNORE
from internlm2.data.shards import Shard, shard_of
from internlm2.data.stream import TokenStream
from internlm2.engine.base import LossSum
from internlm2.engine.single import SingleEngine
from internlm2.model.transformer import CausalLM
from internlm2.sources.source import open_source
from internlm2.text.tokenizer import load_tokenizer
from internlm2.text.tokenizer_training import train_model

SETTINGS = replace(OPTIM, lr=4e-5, weight_decay=0.01)


def dialogs(folder: Path, vocab_size: int) -> Shard:
    """The docstring questions, tokenized with a vocabulary of their own."""
    source = open_source("questions", SourceConfig(kind="stdlib", part="questions"))
    texts = [document.plain_text or "" for unit in source.units() for document in unit.documents()]
    (folder / "tokenizer.model").write_bytes(train_model(texts, vocab_size))
    return shard_of(source, load_tokenizer(folder / "tokenizer.model"), folder, progress=False)


def ours(model: ModelConfig, seq_len: int, shard: Shard, clock: Clock) -> Measure:
    """A function that trains STEPS steps and returns (tokens, seconds)."""
    corpus = Corpus({"questions": shard}, "", 0.0, shard.folder.parent)
    stream = TokenStream(corpus, {"questions": 1.0}, seq_len, long_conversations="cut")
    network = CausalLM.from_config(model, dtype=torch.float32)
    engine = SingleEngine(network, SETTINGS, 10_000, "cpu", "bf16", "stop", None, 1)

    def loss(network: CausalLM, batch) -> LossSum:
        return LossSum(network(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels), batch.loss_tokens)

    def measure() -> tuple[int, float]:
        tokens, started = 0, clock()
        for _ in range(STEPS):
            batch = stream.batch([engine.step])
            engine.train_step([batch], loss)
            tokens += len(batch.ids)
        return tokens, clock() - started

    return measure


def conversations(shard: Shard) -> dict[str, list[list[int]]]:
    """Ids and completion masks, as SFTTrainer takes a tokenized data set."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    assert shard.mask is not None
    for number in range(shard.documents):
        begin, end = int(shard.offsets[number]), int(shard.offsets[number + 1])
        columns["input_ids"].append(np.asarray(shard.tokens[begin:end], np.int64).tolist())
        columns["completion_mask"].append((1 - np.asarray(shard.mask[begin:end])).tolist())
    return columns


def rival(model: ModelConfig, seq_len: int, shard: Shard, clock: Clock) -> Measure:
    """The same for TRL; its start-up before the second step is not counted."""
    import datasets
    from transformers import LlamaForCausalLM
    from transformers import logging as transformers_logging
    from trl import SFTConfig, SFTTrainer

    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    network = LlamaForCausalLM(llama_config(model, seq_len, tie_word_embeddings=model.tie_embeddings)).float()
    data = datasets.Dataset.from_dict(conversations(shard)).shuffle(seed=0)

    class Counting(SFTTrainer):
        tokens: list[int]

        def compute_loss(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            self.tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *args, **kwargs)

    def measure() -> tuple[int, float]:
        steps, seconds = step_times(clock)
        with tempfile.TemporaryDirectory() as folder:
            settings = SFTConfig(
                folder, per_device_train_batch_size=1, learning_rate=4e-5, max_length=seq_len, packing=True,
                packing_strategy="bfd", completion_only_loss=True, **TRAINING,
            )  # fmt: skip
            trainer = Counting(
                model=network,
                args=settings,
                train_dataset=data,
                processing_class=placeholder_tokenizer(),
                callbacks=[steps],
            )
            trainer.tokens = []
            trainer.train()
        return sum(trainer.tokens[1:]), seconds()

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=2048)
    options = arguments(parser)
    model, clock = load_group(ModelConfig, f"model/{options.model}"), CLOCKS[options.clock]
    with tempfile.TemporaryDirectory() as folder:
        shard = dialogs(Path(folder), min(model.vocab_size, 4096))
        sides = {"ours": ours(model, options.seq_len, shard, clock)}
        if trl_is_here():
            sides["TRL SFTTrainer, packing, bf16=True"] = rival(model, options.seq_len, shard, clock)
        rates = race(sides, options.rounds)
        targets = int((np.asarray(shard.mask) == 0).sum()) / shard.total_tokens
        print(f"{shard.documents:,} conversations, {targets:.0%} of the tokens trained (others: label {IGNORE})")
    work = f"fine-tune {options.model} on packed dialogs, {options.seq_len} tokens a step"
    report(rates, work, "tokens/s", options)


if __name__ == "__main__":
    main()
