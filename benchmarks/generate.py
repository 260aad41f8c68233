"""Generation speed against transformers' generate and llama.cpp: the same weights, prompts and number of new tokens.

    python benchmarks/generate.py --model smollm2 --json results.json
    python benchmarks/generate.py --model small --rivals transformers
    python benchmarks/generate.py --model smollm2 --rivals llama.cpp --rows 1 32

Greedy, and no stop ids, so that each side makes exactly rows x new tokens. Rivals take turns with us in one process,
and the best of --repeats runs counts for both. transformers runs with sdpa in bfloat16 (float32 on processors that
multiply bfloat16 slowly, where that is its best), left-padded, with its dynamic and its static cache, and the faster
counts. llama.cpp runs from GGUF files that llama.cpp itself makes out of the
wheel's (bfloat16, and each of Q4_0, Q4_K_M and Q8_0, of which the fastest counts), all rows in one llama_batch.
Times include reading the prompts.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internlm2.generation import Engine, SamplingParams
from internlm2.model import CausalLM
from internlm2.model.export import export_weights
from internlm2.model.weights import load_model, model_weights
from internlm2.ops.processor import bfloat16_is_slow

LLAMA_CPP = "pip install llama-cpp-python  (compiles llama.cpp; about 10 minutes)"


def load(name: str) -> CausalLM:
    """SmolLM2 with its weights; any other shape of conf/model with random ones, which are as fast as trained ones."""
    if name in ("smollm2", "smollm2_135m"):
        return load_model("smollm2", dtype=torch.bfloat16)
    from omegaconf import OmegaConf

    from internlm2.config import ModelConfig

    stored = OmegaConf.load(Path(__file__).resolve().parent.parent / "conf" / "model" / f"{name}.yaml")
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), stored))
    return CausalLM.from_config(config, dtype=torch.bfloat16, seed=0)


def some_prompts(rows: int, vocab_size: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (rows,), generator=draw).tolist()
    return [torch.randint(3, vocab_size, (length,), generator=draw).tolist() for length in lengths]


def ours(model: CausalLM, rows: int, quantize: str) -> Callable[[list[list[int]], int], int]:
    engine = Engine(model, max_rows=rows, quantize=quantize)

    def run(prompts: list[list[int]], new: int) -> int:
        answers = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=new))
        return sum(len(answer.tokens) for answer in answers)

    return run


def transformers_generate(model: CausalLM, cache: str | None) -> Callable[[list[list[int]], int], int]:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        export_weights(model_weights(model), Path(folder) / "llama", layout="llama")
        dtype = torch.float32 if bfloat16_is_slow() else torch.bfloat16
        rival = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "llama", dtype=dtype, attn_implementation="sdpa"
        ).eval()
    rival.generation_config = transformers.GenerationConfig(pad_token_id=0)

    def run(prompts: list[list[int]], new: int) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {} if cache is None else {"cache_implementation": cache}
        with torch.inference_mode():
            out = rival.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)
        return (out.shape[1] - longest) * len(prompts)

    return run


def llama_cpp(kind: str, folder: Path, threads: int, rows: int) -> Callable[[list[list[int]], int], int]:
    """kind BF16, Q8_0, Q4_0 or Q4_K_M: made once from the wheel's file."""
    import ctypes

    import llama_cpp as lib
    import numpy as np

    from internlm2.model.smollm2 import installed_file

    lib.llama_log_set(_silent(lib), None)
    path = folder / f"{kind}.gguf"
    if not path.is_file():
        options = lib.llama_model_quantize_default_params()
        options.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
        options.allow_requantize = True
        if lib.llama_model_quantize(str(installed_file()).encode(), str(path).encode(), ctypes.byref(options)):
            raise RuntimeError(f"llama.cpp could not make {path.name}")
    settings = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(str(path).encode(), settings)
    context_settings = lib.llama_context_default_params()
    context_settings.n_ctx = 256 * rows
    context_settings.n_batch = context_settings.n_ubatch = 512
    context_settings.n_seq_max = rows
    context_settings.n_threads = context_settings.n_threads_batch = threads
    context = lib.llama_init_from_model(model, context_settings)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(512, 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """(token, position, sequence, logits wanted) -> most likely token of each entry that wanted logits."""
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        at = [index for index, entry in enumerate(entries) if entry[3]]
        rows_of = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, index), shape=(size,)) for index in at]
        return np.array([row.argmax() for row in rows_of], dtype=np.int64)

    def run(prompts: list[list[int]], new: int) -> int:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        queue = [
            (token, place, row, place == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        last = [int(token) for start in range(0, len(queue), 512) for token in decode(queue[start : start + 512])]
        for step in range(new - 1):
            entries = [(last[row], len(prompt) + step, row, True) for row, prompt in enumerate(prompts)]
            last = decode(entries).tolist()
        return new * len(prompts)

    return run


def _silent(lib: Any) -> Any:
    global _quiet  # the callback must outlive the call
    _quiet = lib.llama_log_callback(lambda level, text, data: None)
    return _quiet


def race(
    sides: dict[str, Callable], prompts: list[list[int]], new: int, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Best tokens/s of each side, runs interleaved; one short run each goes before."""
    best = dict.fromkeys(sides, 0.0)
    for run in sides.values():
        run(prompts, 4)
    for _ in range(repeats):
        for name, run in sides.items():
            start = clock()
            made = run(prompts, new)
            best[name] = max(best[name], made / (clock() - start))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a shape of conf/model")
    parser.add_argument(
        "--rivals", nargs="+", choices=("transformers", "llama.cpp"), default=["transformers", "llama.cpp"]
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", help="default: 64 against transformers, 1 and 32 against llama.cpp"
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="tokens per second of CPU time: on a busy machine, with --threads 1"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    model = load(options.model)
    records: list[dict[str, Any]] = []

    def report(rows: int, rival: str, mine: str, speeds: dict[str, float]) -> None:
        record = {
            "work": f"generate {options.model}, {rows} x {options.new_tokens} tokens, greedy, {mine}",
            "rival": rival,
            "ours": round(speeds[mine], 1),
            "theirs": round(speeds[rival], 1),
            "unit": "tokens per CPU second" if options.cpu_time else "tokens/s",
            "ratio": round(speeds[mine] / speeds[rival], 2),
            "threads": options.threads,
            "setting": f"best of {options.repeats}, interleaved",
        }
        records.append(record)
        print(
            f"{record['work']:62s} {rival:28s} {record['ours']:9.1f} {record['theirs']:9.1f} {record['ratio']:6.2f}x",
            flush=True,
        )

    print(f"{'work':62s} {'rival':28s} {'ours':>9s} {'theirs':>9s}   ratio   ({options.threads} threads, tokens/s)")
    if "transformers" in options.rivals:
        for rows in options.rows or [64]:
            sides = {
                "ours bf16": ours(model, rows, "none"),
                "ours w8": ours(model, rows, "w8"),
                "ours w4": ours(model, rows, "w4"),
            }
            arithmetic = "fp32" if bfloat16_is_slow() else "bf16"
            rivals = {
                f"transformers {arithmetic} {cache or 'dynamic'}": transformers_generate(model, cache)
                for cache in (None, "static")
            }
            prompts = some_prompts(rows, model.config.vocab_size)
            speeds = race(sides | rivals, prompts, options.new_tokens, options.repeats, clock)
            fastest = max(rivals, key=speeds.__getitem__)
            for mine in sides:
                report(rows, fastest, mine, speeds)
    if "llama.cpp" in options.rivals and options.model in ("smollm2", "smollm2_135m"):
        if importlib.util.find_spec("llama_cpp") is None:
            print(f"llama.cpp is not installed and skipped: {LLAMA_CPP}")
        else:
            with tempfile.TemporaryDirectory() as folder:
                for rows in options.rows or [1, 32]:
                    prompts = some_prompts(rows, model.config.vocab_size)
                    sides = {f"ours {kind}": ours(model, rows, kind) for kind in ("none", "w8", "w4")}
                    kinds = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
                    rivals = {
                        f"llama.cpp {kind}": llama_cpp(kind, Path(folder), options.threads, rows) for kind in kinds
                    }
                    speeds = race(sides | rivals, prompts, options.new_tokens, options.repeats, clock)
                    report(rows, "llama.cpp BF16", "ours none", speeds)
                    fastest = max(rivals, key=speeds.__getitem__)
                    for mine in ("ours w8", "ours w4"):
                        report(rows, fastest, mine, speeds)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
