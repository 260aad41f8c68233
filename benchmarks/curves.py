"""Loss curves of model=tiny with our attention kernels and with the plain PyTorch reference: the same up to rounding?

    python benchmarks/curves.py [--steps 60] [--tokens 512] [--threads 1] [--json FILE]

All four runs start from the same weights and see the same rows, the bytes of Python's own library: kernels and
reference, each in float32 and in bfloat16 (with float32 masters). What bfloat16 alone changes, reference against
reference, is the yardstick for what the kernels change.
"""

import argparse
import inspect
import json
from pathlib import Path

import torch
from optimizer import OPTIM

from internlm2.config import ModelConfig
from internlm2.config.compose import load_group
from internlm2.data.batch import PackedBatch
from internlm2.engine.base import LossSum
from internlm2.engine.single import SingleEngine
from internlm2.model.transformer import CausalLM
from internlm2.ops.extension import instruction_set


def rows_of_bytes(steps: int, tokens: int) -> list[PackedBatch]:
    """One row a step, of two documents, so that attention has a boundary to respect."""
    text = Path(inspect.getfile(argparse)).read_bytes() + Path(inspect.getfile(inspect)).read_bytes()
    batches = []
    for step in range(steps):
        start = step * tokens % (len(text) - tokens)
        ids = torch.tensor(list(text[start : start + tokens]))
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        cut = tokens // 3
        labels[cut - 1] = -100
        batches.append(
            PackedBatch(
                ids=ids,
                labels=labels,
                cu_seqlens=torch.tensor([0, cut, tokens], dtype=torch.int32),
                max_seqlen=tokens - cut,
                sources=torch.zeros(2, dtype=torch.int32),
                documents=torch.arange(2),
            )
        )
    return batches


def curve(attention: str, dtype: str, batches: list[PackedBatch]) -> list[float]:
    network = CausalLM.from_config(load_group(ModelConfig, "model/tiny"), attention=attention, seed=0)
    engine = SingleEngine(network, OPTIM, len(batches), "cpu", dtype, "stop", None, 1)

    def loss(network: CausalLM, batch: PackedBatch) -> LossSum:
        total = network(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels)
        seen.append(total.item() / batch.loss_tokens)
        return LossSum(total, batch.loss_tokens)

    seen: list[float] = []
    for batch in batches:
        engine.train_step([batch], loss)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", dest="json_file", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batches = rows_of_bytes(options.steps, options.tokens)
    runs = {
        f"{name} {dtype}": curve(name, dtype, batches) for dtype in ("fp32", "bf16") for name in ("native", "reference")
    }
    names = list(runs)
    print(f"{'step':>6}" + "".join(f"{name:>16}" for name in names) + f"   ({instruction_set()})")
    for step in sorted({0, *range(9, options.steps, 10), options.steps - 1}):
        print(f"{step + 1:6}" + "".join(f"{runs[name][step]:16.4f}" for name in names))
    for ours, theirs in (("native fp32", "reference fp32"), ("native bf16", "reference bf16"),
                         ("reference bf16", "reference fp32")):  # fmt: skip
        gaps = [abs(a - b) for a, b in zip(runs[ours], runs[theirs])]
        print(f"{ours} against {theirs}: mean {sum(gaps) / len(gaps):.1e}, largest {max(gaps):.1e}")
    if options.json_file:
        record = {"instruction_set": instruction_set(), "tokens": options.tokens, "losses": runs}
        options.json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
