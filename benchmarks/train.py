"""Training tokens/s of one model shape: this engine against transformers' Trainer, interleaved in one process.

    python benchmarks/train.py [--model small] [--seq-len 4096] [--rounds 5] [--threads 2] [--json FILE]

Both sides train the same shape from random weights on the same random tokens, one row of `--seq-len` tokens a step
(one document a row, the worst case for us: shorter documents in a row cost less attention here, not there), AdamW with
gradient clipping at 1.0. Ours: bf16 weights with fp32 masters. The Trainer twice: `bf16=True` (autocast over fp32
weights, the same master-weight arithmetic) and a model in pure bf16 (fewer bytes and worse arithmetic than ours). Also
prints the share of this machine's measured bf16 GEMM peak. `--clock cpu` counts processor seconds instead of the
wall's: on a busy machine, with --threads 1, only their ratios mean something.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
from optimizer import OPTIM
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from internlm2.config import ModelConfig
from internlm2.config.compose import load_group
from internlm2.data.batch import PackedBatch
from internlm2.engine.base import LossSum
from internlm2.engine.single import SingleEngine
from internlm2.model.transformer import CausalLM
from internlm2.run.throughput import causal_pairs, step_flops

STEPS = 2  # steps in one measurement; the Trainer takes one more first, to make its optimizer
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def gemm_peak(clock: Clock) -> float:
    """Best bf16 matmul rate of this process, in flop/s (2048 cubed, multiply and add counted as two)."""
    a, b = torch.randn(2048, 2048, dtype=torch.bfloat16), torch.randn(2048, 2048, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        started = clock()
        torch.nn.functional.linear(a, b)
        best = min(best, clock() - started)
    return 2 * 2048**3 / best


def ours(model: ModelConfig, seq_len: int, ids: torch.Tensor, clock: Clock, dtype: str = "bf16") -> Callable[[], float]:
    """A function that trains STEPS steps and returns its seconds."""
    network = CausalLM.from_config(model, dtype=torch.float32)
    engine = SingleEngine(network, OPTIM, 10_000, "cpu", dtype, "stop", None, 1)
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    batch = PackedBatch(
        ids=ids,
        labels=labels,
        cu_seqlens=torch.tensor([0, seq_len], dtype=torch.int32),
        max_seqlen=seq_len,
        sources=torch.zeros(1, dtype=torch.int32),
        documents=torch.zeros(1, dtype=torch.int64),
    )

    def loss(network: CausalLM, batch: PackedBatch) -> LossSum:
        return LossSum(network(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels), batch.loss_tokens)

    def measure() -> float:
        started = clock()
        for _ in range(STEPS):
            engine.train_step([batch], loss)
        return clock() - started

    return measure


class StepClock(TrainerCallback):
    """Keeps the times at which steps begin and end."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.times.append(self.clock())

    def on_step_end(self, *args, **kwargs) -> None:
        self.times.append(self.clock())


def trainer(model: ModelConfig, seq_len: int, ids: torch.Tensor, clock: Clock, pure_bf16: bool) -> Callable[[], float]:
    """The same for transformers' Trainer; its start-up before the first step is not counted."""
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        max_position_embeddings=max(seq_len, model.max_position_embeddings),
        attn_implementation="sdpa",
        use_cache=False,
    )
    network = LlamaForCausalLM(config).to(torch.bfloat16 if pure_bf16 else torch.float32)
    rows = [{"input_ids": ids, "labels": ids}] * (STEPS + 1)

    def measure() -> float:
        steps = StepClock(clock)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=1,
                max_steps=STEPS + 1,
                learning_rate=3e-4,
                weight_decay=0.1,
                adam_beta2=0.95,
                max_grad_norm=1.0,
                bf16=not pure_bf16,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_num_workers=0,
            )
            Trainer(network, arguments, train_dataset=rows, callbacks=[steps]).train()
        return sum(end - begin for begin, end in zip(steps.times[2::2], steps.times[3::2]))

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", dest="json_file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    model = load_group(ModelConfig, f"model/{arguments.model}")
    ids = torch.randint(0, model.vocab_size, (arguments.seq_len,), generator=torch.Generator().manual_seed(0))
    tokens = STEPS * arguments.seq_len
    flops = step_flops(model, arguments.seq_len, causal_pairs([arguments.seq_len])) / arguments.seq_len  # a token
    clock = CLOCKS[arguments.clock]
    sides = {
        "ours": ours(model, arguments.seq_len, ids, clock),
        "transformers Trainer, bf16=True": trainer(model, arguments.seq_len, ids, clock, pure_bf16=False),
        "transformers Trainer, pure bf16": trainer(model, arguments.seq_len, ids, clock, pure_bf16=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for measured in range(arguments.rounds + 1):
        peaks.append(gemm_peak(clock))
        for name, measure in sides.items():
            elapsed = measure()
            if measured:  # the first round warms up
                seconds[name].append(elapsed)
    records = []
    print(f"{'':34}{'tokens/s':>10}{'of GEMM peak':>14}{'ours is faster by':>20}")
    for name, times in seconds.items():
        rate = tokens / statistics.median(times)
        ratio = statistics.median(theirs / mine for mine, theirs in zip(seconds["ours"], times))
        print(f"{name:34}{rate:10.0f}{rate * flops / max(peaks):14.1%}{ratio:19.2f}x")
        if name != "ours":
            records.append(
                {
                    "work": f"train {arguments.model}, {arguments.seq_len} tokens a step",
                    "rival": name,
                    "ours": tokens / statistics.median(seconds["ours"]),
                    "theirs": rate,
                    "unit": "tokens/s",
                    "ratio": ratio,
                    "threads": arguments.threads,
                    "setting": f"bf16, CPU, {arguments.clock} seconds, GEMM peak {max(peaks) / 1e9:.0f} Gflop/s",
                }
            )
    if arguments.json_file:
        with open(arguments.json_file, "w", encoding="utf-8") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
