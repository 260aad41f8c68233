"""Memory of one training step on one long row: live tensors counted by allocation, and the largest tensor by name.

    python benchmarks/memory.py [--model small] [--seq-len 32768] [--layers N] [--recompute none|full]
                                [--rival-seq-len 4096] [--threads 2] [--json FILE]

Every tensor that an operator returns during forward and backward is noted with its storage, and forgotten when the
storage is freed: the peak is exact and does not depend on the allocator. The rival is transformers' Llama of the same
shape (SDPA, its own loss) at `--rival-seq-len`, with our own figure at that length beside it. `--layers` shortens both
models; the largest tensor does not depend on it.
"""

import argparse
import json
import os
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from internlm2.config import ModelConfig
from internlm2.config.compose import load_group
from internlm2.model import CausalLM


class Allocations(TorchDispatchMode):
    """Live and peak bytes of the tensors made under it, and the largest one in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.largest_name = ""
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf, str(func))
        return out

    def _note(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        weakref.finalize(storage, self._forget, key)
        self.live += size
        self.peak = max(self.peak, self.live)
        if size // tensor.element_size() > self.largest:
            self.largest, self.largest_name = size // tensor.element_size(), f"{name} {list(tensor.shape)}"

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def ours(config: ModelConfig, seq_len: int, recompute: str) -> Allocations:
    """One forward and backward of our model in bf16."""
    model = CausalLM.from_config(config, dtype=torch.bfloat16, recompute=recompute)
    ids = torch.randint(config.vocab_size, (seq_len,), generator=torch.Generator().manual_seed(0))
    with Allocations() as seen:
        loss, count = model.loss(ids, ids.roll(-1), torch.tensor([0, seq_len], dtype=torch.int32), seq_len)
        (loss / count).backward()
    return seen


def theirs(config: ModelConfig, seq_len: int, recompute: str) -> Allocations:
    """The same of transformers' Llama."""
    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        intermediate_size=config.intermediate_size, tie_word_embeddings=config.tie_embeddings, use_cache=False,
        attn_implementation="sdpa", max_position_embeddings=seq_len,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(torch.bfloat16).train()
    if recompute == "full":
        model.gradient_checkpointing_enable()
    ids = torch.randint(config.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))
    with Allocations() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--rival-seq-len", type=int, default=4096)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", dest="json_file", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_group(ModelConfig, f"model/{arguments.model}")
    config = replace(config, layers=arguments.layers or config.layers)
    setting = f"{config.name}, {config.layers} layers, bf16, recompute {arguments.recompute}"
    print(f"{setting}; weights and their gradients: {4 * config.parameters()['total'] / 2**20:,.0f} MiB")

    started = time.perf_counter()
    seen = ours(config, arguments.seq_len, arguments.recompute)
    pairs, words = arguments.seq_len**2, arguments.seq_len * config.vocab_size
    print(f"ours, {arguments.seq_len:,} tokens ({time.perf_counter() - started:.0f} s):")
    print(f"  peak of live tensors {seen.peak / 2**20:,.0f} MiB beyond the weights")
    print(f"  largest tensor {seen.largest:,} elements: {seen.largest_name}")
    verdict = "absent" if seen.largest < min(pairs, words) else "PRESENT"
    print(f"  tokens x tokens {pairs:,}, tokens x words {words:,}: {verdict}")

    length = arguments.rival_seq_len
    own, rival = ours(config, length, arguments.recompute), theirs(config, length, arguments.recompute)
    print(f"{length:,} tokens: ours {own.peak / 2**20:,.0f} MiB, transformers {rival.peak / 2**20:,.0f} MiB, "
          f"ratio {rival.peak / own.peak:.2f}")  # fmt: skip
    print(f"  transformers' largest tensor {rival.largest:,} elements: {rival.largest_name}")
    if arguments.json_file:
        record = {
            "work": f"peak memory of a training step, {length} tokens", "rival": "transformers Llama (SDPA)",
            "ours": own.peak / 2**20, "theirs": rival.peak / 2**20, "unit": "MiB", "ratio": rival.peak / own.peak,
            "threads": arguments.threads, "setting": setting,
        }  # fmt: skip
        arguments.json_file.write_text(json.dumps([record], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
