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
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from internlm2.config import ModelConfig, OptimConfig, SourceConfig
from internlm2.config.compose import load_group
from internlm2.data.corpus import Corpus
from internlm2.data.rows import IGNORE
from internlm2.data.shards import Shard, shard_of
from internlm2.data.sources import open_source
from internlm2.data.stream import TokenStream
from internlm2.data.tokenizer import load_tokenizer
from internlm2.data.tokenizer_training import train_model
from internlm2.engine.base import LossSum
from internlm2.engine.single import SingleEngine
from internlm2.model.transformer import CausalLM

STEPS = 3  # steps in one measurement; TRL takes one more first, to make its optimizer
INSTALL = "pip install trl datasets"
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
OPTIM = OptimConfig(
    lr=4e-5, min_lr_ratio=0.1, schedule="cosine", schedule_start=0.0, schedule_end=1.0, warmup_ratio=0.0, beta1=0.9,
    beta2=0.95, eps=1e-8, weight_decay=0.01, decay_embeddings=False, clip_grad_norm=1.0,
)  # fmt: skip


def dialogs(folder: Path, vocab_size: int) -> Shard:
    """The docstring questions, tokenized with a vocabulary of their own."""
    source = open_source("questions", SourceConfig(kind="stdlib", part="questions"))
    texts = [document.plain_text or "" for unit in source.units() for document in unit.documents()]
    (folder / "tokenizer.model").write_bytes(train_model(texts, vocab_size))
    return shard_of(source, load_tokenizer(folder / "tokenizer.model"), folder, progress=False)


def ours(model: ModelConfig, seq_len: int, shard: Shard, clock: Clock) -> Callable[[], tuple[int, float]]:
    """A function that trains STEPS steps and returns (tokens, seconds)."""
    corpus = Corpus({"questions": shard}, "", 0.0, shard.folder.parent)
    stream = TokenStream(corpus, {"questions": 1.0}, seq_len, long_conversations="cut")
    network = CausalLM.from_config(model, dtype=torch.float32)
    engine = SingleEngine(network, OPTIM, 10_000, "cpu", "bf16", "stop", None, 1)

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


def rival(model: ModelConfig, seq_len: int, shard: Shard, clock: Clock) -> Callable[[], tuple[int, float]]:
    """The same for TRL; its start-up before the second step is not counted."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from transformers import logging as transformers_logging
    from trl import SFTConfig, SFTTrainer

    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    config = LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
        intermediate_size=model.intermediate_size, rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings, attn_implementation="sdpa", use_cache=False,
        max_position_embeddings=max(seq_len, model.max_position_embeddings),
    )  # fmt: skip
    network = LlamaForCausalLM(config).float()
    # SFTTrainer wants a tokenizer object; the data set is tokenized already.
    empty = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2}, unk_token="<pad>"))
    processing = PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>", eos_token="</s>")
    data = datasets.Dataset.from_dict(conversations(shard)).shuffle(seed=0)

    class Steps(TrainerCallback):
        times: list[float]

        def on_step_begin(self, *args, **kwargs) -> None:
            self.times.append(clock())

        def on_step_end(self, *args, **kwargs) -> None:
            self.times.append(clock())

    class Counting(SFTTrainer):
        tokens: list[int]

        def compute_loss(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            self.tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *args, **kwargs)

    def measure() -> tuple[int, float]:
        steps = Steps()
        steps.times = []
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                folder, per_device_train_batch_size=1, max_steps=STEPS + 1, learning_rate=4e-5, weight_decay=0.01,
                adam_beta2=0.95, max_grad_norm=1.0, bf16=True, use_cpu=True, report_to=[], save_strategy="no",
                logging_strategy="no", disable_tqdm=True, max_length=seq_len, packing=True, packing_strategy="bfd",
                completion_only_loss=True, gradient_checkpointing=False,
            )  # fmt: skip
            trainer = Counting(
                model=network, args=arguments, train_dataset=data, processing_class=processing, callbacks=[steps]
            )
            trainer.tokens = []
            trainer.train()
        seconds = sum(end - begin for begin, end in zip(steps.times[2::2], steps.times[3::2]))
        return sum(trainer.tokens[1:]), seconds

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--trl-from", type=Path, help="site-packages folder that holds trl and datasets")
    parser.add_argument("--json", dest="json_file")
    options = parser.parse_args()
    if options.trl_from is not None:
        if not (options.trl_from / "trl").is_dir():
            parser.error(f"--trl-from={options.trl_from} holds no trl")
        sys.path.append(str(options.trl_from))  # behind our own: packages of both keep this environment's version
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(options.threads)
    model, clock = load_group(ModelConfig, f"model/{options.model}"), CLOCKS[options.clock]
    with tempfile.TemporaryDirectory() as folder:
        shard = dialogs(Path(folder), min(model.vocab_size, 4096))
        sides = {"ours": ours(model, options.seq_len, shard, clock)}
        if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
            print(f"TRL is not installed and left out: {INSTALL}, or name its environment with --trl-from")
        else:
            sides["TRL SFTTrainer, packing, bf16=True"] = rival(model, options.seq_len, shard, clock)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for measured in range(options.rounds + 1):
            for name, measure in sides.items():
                tokens, seconds = measure()
                if measured:  # the first round warms up
                    rates[name].append(tokens / seconds)
        targets = int((np.asarray(shard.mask) == 0).sum()) / shard.total_tokens
        print(f"{shard.documents:,} conversations, {targets:.0%} of the tokens trained (others: label {IGNORE})")
    report(rates, options)


def report(rates: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print the medians and, if asked, write the records."""
    records = []
    print(f"{'':38}{'tokens/s':>10}{'ours is faster by':>20}")
    for name, values in rates.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(rates["ours"], values))
        print(f"{name:38}{statistics.median(values):10.0f}{ratio:19.2f}x")
        if name != "ours":
            records.append(
                {
                    "work": f"fine-tune {options.model} on packed dialogs, {options.seq_len} tokens a step",
                    "rival": name,
                    "ours": statistics.median(rates["ours"]),
                    "theirs": statistics.median(values),
                    "unit": "tokens/s",
                    "ratio": ratio,
                    "threads": options.threads,
                    "setting": f"bf16, CPU, {options.clock} seconds",
                }
            )
    if options.json_file:
        Path(options.json_file).write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
