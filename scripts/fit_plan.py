"""Fit the plan's coefficients on the table of published runs, and say how far off they are on rows held out.

python scripts/fit_plan.py              prints the errors
python scripts/fit_plan.py --write      also writes internlm2/plan/coefficients.json
python scripts/fit_plan.py --judge F    errors of the committed coefficients on another table with the same columns
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

from internlm2.plan.coefficients import FITTED, fitted
from internlm2.plan.fitting import fit, judge
from internlm2.plan.published import Errors, PublishedRun, errors, read_runs
from internlm2.plan.published_ppo import judge_ppo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--judge", type=Path, metavar="FILE")
    parser.add_argument("--rows", action="store_true", help="one line a row")
    options = parser.parse_args()
    if options.judge:
        runs, coefficients = read_runs(options.judge), fitted().coefficients
    else:
        runs = read_runs()
        coefficients = fit(runs)
    table(runs, coefficients, options.rows)
    if options.judge:
        return
    record = judge(runs, seeds=range(8))
    factor, ppo = judge_ppo(coefficients)
    record["ppo"] = asdict(ppo)
    print(json.dumps(record, indent=1))
    if options.write:
        values = {name: float(f"{value:.5g}") for name, value in asdict(coefficients).items()}
        FITTED.write_text(
            json.dumps({"coefficients": values, "ppo_factor": round(factor, 4), "errors": _short(record)}, indent=1)
            + "\n"
        )
        print(f"written to {FITTED}")


def table(runs: list[PublishedRun], coefficients: object, rows: bool) -> None:
    groups: dict[str, list[PublishedRun]] = {"all": runs}
    for run in runs:
        groups.setdefault(f"{run.source} {run.hardware.name}", []).append(run)
    for name, group in groups.items():
        line(name, errors(group, coefficients))
    for run in runs if rows else []:
        layout = run.layout
        print(
            f"{run.source:15}{run.network.name:12}{run.hardware.name:8}{layout.gpus:5} GPUs {layout.seq_len:6} "
            f"tokens x {layout.micro_batch} x {layout.accumulation} tp {layout.tensor_parallel} shard {layout.shard:4} "
            f"{layout.recompute:9}{run.tokens_per_second:9.0f} {100 * math.expm1(run.error(coefficients)):+6.1f}%"
        )


def line(name: str, found: Errors) -> None:
    print(
        f"{name:28}{found.rows:4} rows   median {found.median:6.1%}   p90 {found.p90:6.1%}   "
        f"largest {found.largest:6.1%}   bias {found.bias:+6.1%}"
    )


def _short(value: object) -> object:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
