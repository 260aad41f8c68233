"""One table of the rounds of runs that differ in their seed: gold reward, score and KL at the end of each round.

python scripts/rounds_table.py runs/seed0 runs/seed1 runs/seed2 [--json FILE]

Every figure is of held-out prompts and of the last iterate. Rows: each run, then mean and standard deviation (n - 1)
over runs. The last lines say whether every round of every run ends above SFT, and how the gain from the first round to
the last compares with its spread.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from internlm2.run.metrics import read_records
from internlm2.stages.ppo import finished_rounds

NAMES = ("gold", "score", "kl")


def read_run(folder: Path) -> dict[str, list[float]]:
    """Name -> values of one run: of SFT, then of each round."""
    rounds = finished_rounds(folder / "ppo")
    if not rounds or "gold" not in rounds[0]["fixed"]["late"]:
        raise SystemExit(f"{folder} has no finished round whose gold reward is known.")
    found = {
        name: [rounds[0]["fixed"]["sft"][name], *(one["fixed"]["late"][name] for one in rounds)]
        for name in ("gold", "score")
    }
    records = [read_records(folder / "ppo" / f"round_{one['round']}" / "policy" / "metrics.jsonl") for one in rounds]
    return found | {"kl": [0.0, *(lines[-1]["held_out"]["all"]["kl"] for lines in records)]}


def spread(values: list[float]) -> float:
    """Standard deviation of a sample; 0 where there is one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def summary(runs: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Means and spreads by round, and the two verdicts."""
    rounds = {len(run["gold"]) for run in runs.values()}
    if len(rounds) > 1:
        raise SystemExit(f"the runs have finished different numbers of rounds: {sorted(n - 1 for n in rounds)}.")
    gold = [run["gold"] for run in runs.values()]
    gains = [one[-1] - one[1] for one in gold]
    by_round = {name: list(zip(*(run[name] for run in runs.values()))) for name in NAMES}
    return {
        "mean": {name: [statistics.fmean(values) for values in columns] for name, columns in by_round.items()},
        "spread": {name: [spread(list(values)) for values in columns] for name, columns in by_round.items()},
        "every_round_above_sft": all(value > one[0] for one in gold for value in one[1:]),
        "gain_from_first_to_last_round": statistics.fmean(gains),
        "spread_of_last_round": spread([one[-1] for one in gold]),
        "spread_of_gain": spread(gains),
    }


def show(runs: dict[str, dict[str, list[float]]], found: dict[str, Any]) -> None:
    count = len(found["mean"]["gold"])
    table = Table(title="gold / score / KL (nats an answer)")
    for title in ("run", "SFT", *(f"round {number}" for number in range(1, count))):
        table.add_column(title)
    over_runs = (("mean", found["mean"]), ("spread", found["spread"])) if len(runs) > 1 else ()
    for label, run in (*runs.items(), *over_runs):
        table.add_row(label, *(" / ".join(f"{run[name][place]:.2f}" for name in NAMES) for place in range(count)))
    console = Console()
    console.print(table)
    console.print(f"every round of every run above SFT: {'yes' if found['every_round_above_sft'] else 'no'}")
    gain = f"gold reward, last round minus first: {found['gain_from_first_to_last_round']:+.2f}"
    if len(runs) > 1:
        gain += (
            f" in the mean, {found['spread_of_gain']:.2f} its spread, {found['spread_of_last_round']:.2f} that of the "
            "last round"
        )
    console.print(gain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs, root/name")
    parser.add_argument("--json", type=Path, dest="json_file")
    options = parser.parse_args()
    runs = {folder.name: read_run(folder) for folder in options.runs}
    found = summary(runs)
    show(runs, found)
    if options.json_file:
        options.json_file.write_text(json.dumps({"runs": runs, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
