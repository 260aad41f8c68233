"""Evaluation speed against lm-eval's own `hf` backend: GSM8K problems, the same weights, prompts, tasks and stop texts.

    python benchmarks/evaluate.py --gsm8k gsm8k/ --problems 200 --json results.json
    python benchmarks/evaluate.py --gsm8k gsm8k/ --problems 8 --new-tokens 32 --dtype fp32 --rival-batch 8

`--gsm8k` holds train.jsonl and test.jsonl (github.com/openai/grade-school-math). Both sides run through
lm_eval.simple_evaluate, one after the other in one process, on the same local task of 4 examples: generation of
answers, and likelihoods of the reference answers. `hf` runs from our Llama-layout export, with --rival-batch prompts at
a time (lm-eval's default is 1). Both compute in --dtype: on a processor without bfloat16 products take fp32, in which
`hf` is many times faster there. Both sides' figures are printed, so that speed is not bought
with other answers. --clock cpu counts the process's CPU seconds, for machines that others use too.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TASK = """
task: speed_gsm8k
dataset_path: json
dataset_kwargs:
  data_files: {{test: {gsm8k}/test.jsonl, train: {gsm8k}/train.jsonl}}
test_split: test
fewshot_split: train
num_fewshot: 4
fewshot_config: {{sampler: first_n}}
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: " {{{{answer}}}}"
generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: {new_tokens}}}
metric_list: [{{metric: exact_match, regexes_to_ignore: [",", "(?s).*#### "]}}]
"""
LIKELIHOOD = """
task: speed_likelihood
dataset_path: json
dataset_kwargs:
  data_files: {{test: {gsm8k}/test.jsonl, train: {gsm8k}/train.jsonl}}
test_split: test
fewshot_split: train
num_fewshot: 4
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: ["{{{{answer}}}}", "{{{{question}}}}"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
TASKS = {"generation": ("speed_gsm8k", TASK), "likelihoods": ("speed_likelihood", LIKELIHOOD)}


def main() -> int:
    """Run the race; 0, or 1 where lm-eval is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="whatever python -m internlm2.evaluate takes")
    parser.add_argument("--gsm8k", required=True, type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of both sides")
    parser.add_argument("--rival-batch", type=int, default=1, help="prompts that hf runs together (default 1)")
    parser.add_argument("--works", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", dest="json_file", type=Path)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        print("lm-eval is not installed: pip install 'internlm2[evaluate]'", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        records = race(options, Path(folder))
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 0


def race(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds of both sides for each kind of work."""
    import torch

    import internlm2.evaluate.harness  # noqa: F401  registers the model
    from internlm2.model.export import export_weights
    from internlm2.model.weights import open_weights

    torch.set_num_threads(options.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    exported = export_weights(open_weights(options.model), folder / "llama", layout="llama", dtype=dtype).folder
    names = {"gsm8k": options.gsm8k.resolve(), "new_tokens": options.new_tokens}
    for name, text in TASKS.values():
        (folder / f"{name}.yaml").write_text(text.format(**names), encoding="utf-8")
    sides = {
        "ours": ("internlm2", f"path={options.model},threads={options.threads},dtype={options.dtype}", 1),
        "theirs": ("hf", f"pretrained={exported},dtype={str(dtype).removeprefix('torch.')}", options.rival_batch),
    }
    records = []
    for work in options.works:
        task, seconds, figures = TASKS[work][0], {}, {}
        for side, (model, arguments, batch) in sides.items():
            seconds[side], figures[side] = run(folder, task, model, arguments, batch, options)
            print(f"{work:12} {side:7} {seconds[side]:9.1f} s   {figures[side]}", flush=True)
        ratio = seconds["theirs"] / seconds["ours"]
        print(f"{work:12} {ratio:.1f} times as fast as lm-eval's hf backend at batch {options.rival_batch}")
        setting = (
            f"{options.model}, {options.problems} GSM8K problems, 4 examples, {options.new_tokens} new tokens, "
            f"{options.dtype}"
        )
        records.append(
            {
                "work": work,
                "rival": f"lm-eval hf, batch {options.rival_batch}",
                **seconds,
                "unit": f"s ({options.clock})",
                "ratio": ratio,
                "threads": options.threads,
                "setting": setting,
                "figures": figures,
            }
        )
    return records


def run(
    folder: Path, task: str, model: str, arguments: str, batch: int, options: argparse.Namespace
) -> tuple[float, dict[str, float]]:
    """(seconds inside the model's requests, metrics). Loading the model is not counted."""
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager, get_task_dict

    loaded = get_model(model).create_from_arg_string(arguments, {"batch_size": batch, "device": "cpu"})
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    get_task_dict([task], manager)  # the first to ask builds the data set: neither side should pay for that
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    started = clock()
    found = lm_eval.simple_evaluate(
        model=loaded,
        tasks=[task],
        limit=options.problems,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    seconds = clock() - started
    return seconds, {key: value for key, value in found["results"][task].items() if isinstance(value, float)}


if __name__ == "__main__":
    sys.exit(main())
