"""The CPU kernels against their rivals, interleaved in one process.

    python benchmarks/kernels.py [--only attention,decode,linear,plain,model] [--threads 1 2] [--rounds 5] [--quick]
                                 [--json FILE]

Each round measures ours and every rival once, in turn; a ratio is the median over rounds of theirs / ours, so a slow
moment of the machine hits both. One thread: CPU time of that thread; more: wall time. Above 1: ours is faster.

attention  rope_attention forward, and forward + backward, against the rotary embedding of transformers + torch's SDPA
decode     decode_attention against torch's SDPA; the bandwidth of its KV reads beside that of a plain sum over memory
linear     quantized_linear in 4 and 8 bits against F.linear in bfloat16, torch's int4 operator, llama.cpp's Q4_0;
           weights rotate through more memory than the caches hold
plain      Linear against F.linear: float32 forward and both gradients, bfloat16 with a few rows
model      training steps and batched generation of model=small with the compiled kernels and without them (torch's own)

torch runs in the dtype that is named, or in float32 on processors that multiply bfloat16 slowly: its best there.

The machine's peaks are measured first, by the kernels that reach them: what a ratio can be at most follows from them.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import ggml
import torch
import torch.nn.functional as F
from torch import Tensor

from internlm2.config import ModelConfig
from internlm2.config.compose import load_group
from internlm2.config.precision import settled_dtype
from internlm2.generation import Engine, SamplingParams
from internlm2.model.transformer import CausalLM
from internlm2.ops import (
    Linear,
    decode_attention,
    extension,
    pack_weight,
    packed_linear,
    quantize_weight,
    quantized_linear,
    rope_attention,
)
from internlm2.ops.extension import instruction_set
from internlm2.ops.processor import bfloat16_is_slow

Sides = dict[str, Callable[[], object]]


class Bench:
    def __init__(self, threads: int, rounds: int, quick: bool):
        self.threads, self.rounds, self.quick = threads, rounds, quick
        self.records: list[dict[str, object]] = []
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        torch.set_num_threads(threads)

    def compare(self, work: str, setting: str, sides: Sides, amounts: dict[str, float] | None = None) -> None:
        """Times the sides, the first of which is ours, in ms; with `amounts` of GB for each side, rates in GB/s."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        for measured in range(self.rounds + 1):
            for name, run in sides.items():
                started = self.clock()
                run()
                if measured:  # the first round warms up
                    times[name].append(self.clock() - started)
        (ours, mine), *rivals = times.items()
        for name, theirs in rivals:
            ratio = statistics.median(b / a for a, b in zip(mine, theirs))
            values, unit = (min(mine) * 1e3, min(theirs) * 1e3), "ms"
            if amounts is not None:
                values, unit = (amounts[ours] / min(mine), amounts[name] / min(theirs)), "GB/s"
                ratio *= amounts[ours] / amounts[name]
            self.records.append({
                "work": work, "rival": name, "ours": values[0], "theirs": values[1], "unit": unit, "ratio": ratio,
                "threads": self.threads, "setting": setting,
            })  # fmt: skip
            print(
                f"{work:33} {setting:42} {name:25} {self.threads:7} "
                f"{values[0]:9.3f} {values[1]:10.3f} {unit:4} {ratio:7.2f}x",
                flush=True,
            )


def rivals_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if bfloat16_is_slow() else dtype


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows).double()[:, None] * 1e6 ** (-torch.arange(0, dim, 2).double() / dim)
    return angles.cos().float(), angles.sin().float()


def transformers_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' apply_rotary_pos_emb: in the model's dtype, [1, heads, S, D] by [S, D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def attention(bench: Bench) -> None:
    sizes = [512, 2048] if bench.quick else [512, 1024, 2048, 4096, 8192]
    cases = [(f"16 heads, 8 kv, D 128, {n} tokens", [n], 8, 2, 128, torch.bfloat16) for n in sizes]
    packed = [700, 41, 1, 355, 1203, 96, 530, 1170]
    cases += [
        ("12 heads, 2 kv, D 96, 8 documents, 4096", packed, 2, 6, 96, torch.bfloat16),
        ("8 heads, 4 kv, D 64, 8 documents, 4096", packed, 4, 2, 64, torch.bfloat16),
        ("16 heads, 8 kv, D 128, 2048 tokens, fp32", [2048], 8, 2, 128, torch.float32),
    ]
    for setting, lengths, groups, queries, dim, dtype in cases:
        tokens, longest = sum(lengths), max(lengths)
        cos, sin = table(longest, dim)
        their_dtype = rivals_dtype(dtype)
        wide_cos, wide_sin = (torch.cat((x, x), dim=-1).to(their_dtype) for x in (cos, sin))
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        draw = torch.Generator().manual_seed(0)
        qkv = torch.randn(tokens, groups, queries + 2, dim, generator=draw).to(dtype).requires_grad_()
        grad = torch.randn(tokens, groups * queries, dim, generator=draw).to(dtype)
        their_qkv, their_grad = qkv.detach().to(their_dtype).requires_grad_(), grad.to(their_dtype)

        def ours() -> Tensor:
            return rope_attention(qkv, cos, sin, cu_seqlens, longest, backend="native")  # noqa: B023

        def theirs() -> Tensor:
            outputs = []
            for part in their_qkv.split(lengths):  # noqa: B023
                n = len(part)
                q = part[:, :, :-2].reshape(n, -1, dim).transpose(0, 1)[None]  # noqa: B023
                k, v = part[:, :, -2].transpose(0, 1)[None], part[:, :, -1].transpose(0, 1)[None]
                q, k = (transformers_rotary(x, wide_cos[:n], wide_sin[:n]) for x in (q, k))  # noqa: B023
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                outputs.append(out[0].transpose(0, 1))
            return torch.cat(outputs)

        def trained(forward: Callable[[], Tensor], qkv: Tensor, grad: Tensor) -> Callable[[], None]:
            def run() -> None:
                forward().backward(grad)
                qkv.grad = None

            return run

        rival = f"transformers rope + SDPA {short(their_dtype)}"

        with torch.no_grad():
            bench.compare("rope_attention forward", setting, {"ours": ours, rival: theirs})
        sides = {"ours": trained(ours, qkv, grad), rival: trained(theirs, their_qkv, their_grad)}
        bench.compare("rope_attention forward + backward", setting, sides)


def decode(bench: Bench) -> None:
    # rows, heads, kv heads, cache length, head dim
    cases = [(8, 16, 8, 1024, 128), (8, 16, 8, 4096, 128), (8, 32, 8, 4096, 128), (8, 48, 8, 4096, 128)]
    cases += [] if bench.quick else [(1, 16, 8, 32768, 128), (32, 16, 8, 1024, 128), (7, 12, 2, 1501, 96)]
    memory = torch.zeros(16 << 20, dtype=torch.int64)  # 134 MB, past any cache here
    for batch, heads, groups, length, dim in cases:
        draw = torch.Generator().manual_seed(0)
        q = torch.randn(batch, heads, dim, generator=draw).bfloat16()
        keys, values = (torch.randn(batch, groups, length, dim, generator=draw).bfloat16() for _ in range(2))
        lengths = torch.full((batch,), length, dtype=torch.int32)
        their_dtype = rivals_dtype(torch.bfloat16)
        their_q, their_keys, their_values = (x.to(their_dtype) for x in (q, keys, values))
        size = (keys.nbytes + values.nbytes) / 1e9
        setting = f"B {batch}, {heads}/{groups} heads, L {length}, D {dim}, {size * 1e3:.0f} MB"

        def ours() -> Tensor:
            return decode_attention(q, keys, values, lengths, backend="native")  # noqa: B023

        def theirs() -> Tensor:
            return F.scaled_dot_product_attention(their_q[:, :, None], their_keys, their_values, enable_gqa=True)  # noqa: B023

        bench.compare("decode_attention", setting, {"ours": ours, f"torch SDPA {short(their_dtype)}": theirs})
        amounts = {"ours": size, "torch sum over 134 MB": memory.nbytes / 1e9}
        sides = {"ours": ours, "torch sum over 134 MB": memory.sum}
        bench.compare("decode_attention, share of memory", setting, sides, amounts)


def rotating(make: Callable[[], Callable[[Tensor], Tensor]], size: int, x: Tensor, calls: int) -> Callable[[], None]:
    """`calls` calls over copies of a weight of `size` bytes, more in all than caches hold."""
    copies = [make() for _ in range(max(2, math.ceil((160 << 20) / size)))]
    turn = itertools.cycle(copies)

    def run() -> None:
        with torch.no_grad():
            for _ in range(calls):
                next(turn)(x)

    return run


def linear(bench: Bench) -> None:
    shapes = [(4096, 4096)] if bench.quick else [(4096, 4096), (2048, 8192), (1000, 2900)]
    for outputs, inputs in shapes:
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02
        for rows in (1, 8, 32, 128):
            x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
            calls = 10 if rows < 32 else 3
            setting = f"{rows} x {inputs} -> {outputs}, {calls} calls"
            dtype = rivals_dtype(torch.bfloat16)
            rivals: Sides = {f"F.linear {short(dtype)}": plain_side(weight, x, calls, dtype)}
            if inputs % 128 == 0 and outputs % 64 == 0:
                rivals["torch int4pack"] = int4pack_side(weight, x, calls)
            q4_0 = ggml.q4_0_side(weight, x, calls, bench.threads)
            for bits, act_bits in ((4, 8), (4, 16), (8, 8), (8, 16)):
                against = dict(rivals)
                if bits == 8:
                    against.pop("torch int4pack", None)
                if act_bits == 8 and bits == 4 and q4_0 is not None:
                    against["llama.cpp Q4_0"] = q4_0
                ours = quantized_side(weight, bits, act_bits, x, calls)
                bench.compare(f"quantized_linear W{bits}A{act_bits}", setting, {"ours": ours, **against})


def quantized_side(weight: Tensor, bits: int, act_bits: int, x: Tensor, calls: int) -> Callable[[], None]:
    def make() -> Callable[[Tensor], Tensor]:
        quantized = quantize_weight(weight, bits)
        return lambda x: quantized_linear(x, quantized, act_bits, backend="native")

    return rotating(make, weight.numel() * bits // 8, x, calls)


def plain_side(weight: Tensor, x: Tensor, calls: int, dtype: torch.dtype) -> Callable[[], None]:
    def make() -> Callable[[Tensor], Tensor]:
        copied = weight.to(dtype, copy=True)
        return lambda x: F.linear(x, copied)

    return rotating(make, weight.numel() * dtype.itemsize, x.to(dtype), calls)


def few_rows_side(weight: Tensor, x: Tensor, calls: int) -> Callable[[], None]:
    def make() -> Callable[[Tensor], Tensor]:
        layer = Linear(*reversed(weight.shape), bias=False, dtype=torch.bfloat16)
        layer.load_state_dict({"weight": weight})
        return layer

    return rotating(make, weight.numel() * 2, x, calls)


def int4pack_side(weight: Tensor, x: Tensor, calls: int) -> Callable[[], None]:
    codes = torch.randint(0, 16, weight.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    scales_and_zeros = torch.ones(weight.shape[1] // 128, weight.shape[0], 2, dtype=torch.bfloat16)

    def make() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales_and_zeros)

    return rotating(make, weight.numel() // 2, x, calls)


def plain(bench: Bench) -> None:
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    for rows in (1, 2, 4):
        x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(1)).bfloat16()
        dtypes = {torch.bfloat16, rivals_dtype(torch.bfloat16)}
        sides = {"ours": few_rows_side(weight, x, 5)}
        sides |= {f"F.linear {short(dtype)}": plain_side(weight, x, 5, dtype) for dtype in sorted(dtypes, key=str)}
        bench.compare("Linear bfloat16", f"{rows} x 4096 -> 4096, 5 calls", sides)
    for rows, inputs, outputs in ((1024, 2048, 2048), (333, 512, 1408)):
        layer, x = Linear(inputs, outputs, bias=False), torch.randn(rows, inputs).requires_grad_()
        grad = torch.randn(rows, outputs)

        def ours() -> None:
            layer(x).backward(grad)  # noqa: B023

        def theirs() -> None:
            F.linear(x, layer.weight).backward(grad)  # noqa: B023

        setting = f"{rows} x {inputs} -> {outputs}, forward + backward"
        bench.compare("Linear float32", setting, {"ours": ours, "F.linear float32": theirs})


def model(bench: Bench) -> None:
    from train import STEPS
    from train import ours as training  # imports transformers, which the other groups do without

    config, length = load_group(ModelConfig, "model/small"), 2048
    ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    dtype = settled_dtype("auto", "cpu")
    sides = {
        "ours": training(config, length, ids, bench.clock, dtype),
        "kernels off": without_kernels(training(config, length, ids, bench.clock, dtype)),
    }
    bench.compare("training, model=small", f"{STEPS} steps of {length} tokens, {dtype}", sides)
    network = CausalLM.from_config(config, dtype=torch.bfloat16, seed=0)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (64,), generator=draw).tolist()
    prompts = [torch.randint(3, config.vocab_size, (n,), generator=draw).tolist() for n in lengths]

    def generating(quantize: str) -> Callable[[], object]:
        engine, params = Engine(network, quantize=quantize), SamplingParams(temperature=0.0, max_new_tokens=64)
        return lambda: engine.generate(prompts, params)

    with mock.patch.object(extension, "loaded", return_value=False):
        off = without_kernels(generating("none"))
    for quantize in ("none", "w8", "w4"):
        sides = {"ours": generating(quantize), "kernels off": off}
        bench.compare("generation, model=small", f"64 rows x 64 tokens, quantize={quantize} (off: none)", sides)


def without_kernels(run: Callable[[], object]) -> Callable[[], object]:
    """The same in plain PyTorch, as on a machine without a compiler."""

    def plainly() -> object:
        with mock.patch.object(extension, "loaded", return_value=False):
            return run()

    return plainly


def peaks(bench: Bench) -> None:
    """Products that stay in cache, and a sum over memory: the rates that bound the ones above."""
    x, weight = torch.randn(96, 1024), torch.randn(1024, 1024)
    packed, wide = pack_weight(weight.bfloat16()), pack_weight(weight)
    quantized, memory = quantize_weight(weight, 8), torch.zeros(16 << 20, dtype=torch.int64)
    narrow, work = x.bfloat16(), 2 * x.numel() * len(weight) / 1e9
    runs: dict[str, tuple[Callable[[], object], float, str]] = {
        "bfloat16 products": (lambda: packed_linear(narrow, packed), work, "Gflop/s"),
        "float32 products": (lambda: packed_linear(x, wide), work, "Gflop/s"),
        "int8 products": (lambda: quantized_linear(narrow, quantized, 8), work, "Gop/s"),
        "reading memory": (memory.sum, memory.nbytes / 1e9, "GB/s"),
    }
    for name, (run, amount, unit) in runs.items():
        best = math.inf
        for _ in range(20):
            started = bench.clock()
            run()
            best = min(best, bench.clock() - started)
        print(f"{name:33} {amount / best:9.1f} {unit}, {bench.threads} threads")


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(names)} x {names[0]}, {platform.machine()}, torch {torch.__version__}, kernels {instruction_set()}"


def main() -> None:
    groups = {"attention": attention, "decode": decode, "linear": linear, "plain": plain, "model": model}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(groups), help="comma-separated groups")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--json", dest="json_file")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    unknown = [name for name in chosen if name not in groups]
    if unknown:
        parser.error(f"no group {unknown[0]!r}: use {', '.join(groups)}")
    if instruction_set() == "none":
        parser.error("the CPU kernels are not built: pip install -e . --no-build-isolation")
    print(machine())
    if "linear" in chosen and ggml.missing() is not None:
        print(f"llama.cpp is left out: {ggml.missing()}")
    print(f"{'work':33} {'setting':42} {'rival':25} {'threads':>7} {'ours':>9} {'theirs':>10} {'':4} {'faster by':>8}")
    records: list[dict[str, object]] = []
    for threads in arguments.threads:
        bench = Bench(threads, arguments.rounds, arguments.quick)
        peaks(bench)
        for name in chosen:
            groups[name](bench)
        records += bench.records
    if arguments.json_file:
        command = "python benchmarks/kernels.py " + " ".join(sys.argv[1:])
        for record in records:
            record.update(machine=machine(), command=command)
        Path(arguments.json_file).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
