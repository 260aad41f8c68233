"""What the races against TRL's trainers share: the clocks, the rival's model and step times, the rounds, the table."""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internlm2.config import ModelConfig

STEPS = 3  # steps in one measurement; TRL takes one more first, to make its optimizer
INSTALL = "pip install trl datasets"
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
Measure = Callable[[], tuple[int, float]]  # (units, seconds) of STEPS steps
# What TRL's trainers are told beside their own settings; the optimizer is the same on both sides.
TRAINING = {
    "max_steps": STEPS + 1, "weight_decay": 0.01, "adam_beta2": 0.95, "max_grad_norm": 1.0, "bf16": True,
    "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    "gradient_checkpointing": False,
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of every race, parsed, and the process made ready: threads, quiet libraries, TRL's environment."""
    parser.add_argument("--model", default="small")
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
    return options


def trl_is_here() -> bool:
    """Can TRL be imported? Says how to install it where not."""
    if importlib.util.find_spec("trl") is not None and importlib.util.find_spec("datasets") is not None:
        return True
    print(f"TRL is not installed and left out: {INSTALL}, or name its environment with --trl-from")
    return False


def llama_config(model: ModelConfig, seq_len: int, **changes: Any) -> Any:
    """The same shape for transformers' Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
        intermediate_size=model.intermediate_size, rms_norm_eps=model.norm_eps, attn_implementation="sdpa",
        use_cache=False, max_position_embeddings=max(seq_len, model.max_position_embeddings), **changes,
    )  # fmt: skip


def placeholder_tokenizer() -> Any:
    """TRL's trainers want a tokenizer object; the data sets are tokenized already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>", eos_token="</s>")


def step_times(clock: Clock) -> tuple[Any, Callable[[], float]]:
    """(a trainer callback, the seconds that all its steps but the first took)."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            times.append(clock())

        def on_step_end(self, *args, **kwargs) -> None:
            times.append(clock())

    return Steps(), lambda: sum(end - begin for begin, end in zip(times[2::2], times[3::2]))


def race(sides: dict[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Units a second of each side in each round, the sides in turn; one round before them warms up."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for measured in range(rounds + 1):
        for name, measure in sides.items():
            units, seconds = measure()
            if measured:
                rates[name].append(units / seconds)
    return rates


def report(rates: dict[str, list[float]], work: str, unit: str, options: argparse.Namespace) -> None:
    """Print the medians and, if asked, write the records."""
    records = []
    print(f"{'':38}{unit:>10}{'ours is faster by':>20}")
    for name, values in rates.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(rates["ours"], values))
        print(f"{name:38}{statistics.median(values):10.2f}{ratio:19.2f}x")
        if name != "ours":
            records.append(
                {
                    "work": work,
                    "rival": name,
                    "ours": statistics.median(rates["ours"]),
                    "theirs": statistics.median(values),
                    "unit": unit,
                    "ratio": ratio,
                    "threads": options.threads,
                    "setting": f"bf16, CPU, {options.clock} seconds",
                }
            )
    if options.json_file:
        Path(options.json_file).write_text(json.dumps(records, indent=1), encoding="utf-8")
