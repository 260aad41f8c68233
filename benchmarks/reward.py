"""Reward model pairs/s: the training step of stage=rm on packed pairs against TRL's RewardTrainer.

    python benchmarks/reward.py [--model small] [--seq-len 512] [--batch-tokens 4096] [--rounds 3] [--threads 2]
                                [--clock cpu] [--json FILE] [--trl-from ENVIRONMENT/lib/python3.11/site-packages]

Both sides train the same shape with one output, from random weights, on the same pairs: questions about Python out of
the running Python (data=docstrings), the right answer against that to another question, tokenized by the same
vocabulary and ended by the reward token. AdamW with clipping at 1.0. Ours: the batches of the preference stream without
padding, focal ranking loss and barrier, bf16 weights with fp32 masters. TRL: as many pairs a step as ours has on
average, padded to the longest as it does by default, its own loss, `bf16=True` (autocast over fp32 weights) with
scaled-dot-product attention. Tokenizing is done beforehand on both sides. `--clock cpu` counts processor seconds: on a
busy machine, with --threads 1, only the ratio means something. TRL is skipped, with its install command, where it is
not installed; `--trl-from` names the site-packages of another environment of the same Python that has it.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

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

from internlm2.config import ModelConfig, RewardConfig, SourceConfig, TrainConfig
from internlm2.config.compose import load_group
from internlm2.data.corpus import Corpus
from internlm2.data.preference_pairs import PreferencePairs
from internlm2.data.preference_stream import PreferenceStream
from internlm2.data.reward_sequence import RewardSequences
from internlm2.data.shards import shard_of
from internlm2.engine.single import SingleEngine
from internlm2.model.scalar import ScalarModel
from internlm2.rlhf.reward_loss import reward_loss
from internlm2.sources.source import open_source
from internlm2.text.tokenizer import load_tokenizer
from internlm2.text.tokenizer_training import train_model

SETTINGS = replace(OPTIM, lr=1e-5, min_lr_ratio=0.5, weight_decay=0.01)


def pairs_of_questions(folder: Path, vocab_size: int, seq_len: int, batch_tokens: int) -> PreferenceStream:
    """The docstring questions as pairs, tokenized with a vocabulary of their own."""
    source = open_source("questions", SourceConfig(kind="stdlib", part="questions"))
    documents = [document for unit in source.units() for document in unit.documents()]
    turns = [document.messages for document in documents if document.messages]
    records = [
        {"prompt": asked[-2].content, "chosen": asked[-1].content, "rejected": other[-1].content}
        for asked, other in zip(turns, [*turns[1:], turns[0]], strict=True)
    ]
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    texts = [document.plain_text or "" for document in documents]
    (folder / "tokenizer.model").write_bytes(train_model(texts, vocab_size))
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    pairs = open_source("pairs", SourceConfig(kind="preferences", path=str(file)))
    shard = shard_of(pairs, tokenizer, folder, progress=False)
    corpus = Corpus({"pairs": shard}, tokenizer.fingerprint, 0.0, folder)
    table = PreferencePairs(corpus, ["pairs"], RewardSequences(tokenizer, {}, seq_len))
    return PreferenceStream(table, {"pairs": 1.0}, batch_tokens, 0)


def ours(model: ModelConfig, stream: PreferenceStream, clock: Clock) -> Measure:
    """A function that trains STEPS steps and returns (pairs, seconds)."""
    network = ScalarModel.from_config(model, dtype=torch.float32)
    engine = SingleEngine(network, SETTINGS, 10_000, "cpu", "bf16", "stop", None, 1)
    loss = reward_loss(load_group(RewardConfig, "reward/conditional"))
    seq_len = stream.pairs.sequences.seq_len
    train = TrainConfig(
        seq_len=seq_len, batch_tokens=stream.batch_tokens, micro_batch=stream.batch_tokens // (2 * seq_len),
        steps=STEPS, tokens=None, epochs=None,
    )  # fmt: skip

    def measure() -> tuple[int, float]:
        pairs, started = 0, clock()
        for _ in range(STEPS):
            batches = stream.micro_batches(engine.step, train, 0, 1)
            engine.train_step(batches, loss)
            pairs += sum(batch.loss_tokens for batch in batches)
        return pairs, clock() - started

    return measure


def rival(model: ModelConfig, stream: PreferenceStream, clock: Clock, padding: list[float]) -> Measure:
    """The same for TRL; its start-up before the second step is not counted. Each batch adds its share of `padding`."""
    import datasets
    from transformers import LlamaForSequenceClassification, PrinterCallback
    from transformers import logging as transformers_logging
    from trl import RewardConfig as TRLConfig
    from trl import RewardTrainer

    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    seq_len, table = stream.pairs.sequences.seq_len, stream.pairs.training
    network = LlamaForSequenceClassification(llama_config(model, seq_len, num_labels=1, pad_token_id=0)).float()
    sides = {"chosen_ids": table.chosen, "rejected_ids": table.rejected}
    default = stream.pairs.domains[0]
    columns = {key: [stream.pairs.ids(int(n), default).tolist() for n in side] for key, side in sides.items()}
    data = datasets.Dataset.from_dict(columns).shuffle(seed=0)
    pairs = round(len(table) / stream.steps(1))

    class Counting(RewardTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            mask = inputs["attention_mask"]
            padding.append(1 - float(mask.float().mean()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def measure() -> tuple[int, float]:
        steps, seconds = step_times(clock)
        with tempfile.TemporaryDirectory() as folder:
            settings = TRLConfig(
                folder, per_device_train_batch_size=pairs, learning_rate=1e-5, max_length=seq_len, **TRAINING
            )
            trainer = Counting(
                model=network,
                args=settings,
                train_dataset=data,
                processing_class=placeholder_tokenizer(),
                callbacks=[steps],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return pairs * STEPS, seconds()

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    options = arguments(parser)
    model, clock = load_group(ModelConfig, f"model/{options.model}"), CLOCKS[options.clock]
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = min(model.vocab_size, 4096)
        stream = pairs_of_questions(Path(folder), vocab_size, options.seq_len, options.batch_tokens)
        padding: list[float] = []
        sides = {"ours": ours(model, stream, clock)}
        if trl_is_here():
            sides["TRL RewardTrainer, bf16=True"] = rival(model, stream, clock, padding)
        rates = race(sides, options.rounds)
        count = len(stream.pairs.training)
        print(f"{count:,} pairs, {count / stream.steps(1):.1f} in a batch of {options.batch_tokens:,} tokens")
        if padding:
            print(f"padding: {statistics.mean(padding):.0%} of the tokens that TRL computes, none of ours")
    work = f"reward model {options.model} on pairs, at most {options.batch_tokens} tokens a step"
    report(rates, work, "pairs/s", options)


if __name__ == "__main__":
    main()
