"""How a reward model's verdicts on held-out pairs are shown: tables for the log, figures for the report."""

from collections.abc import Mapping
from typing import Any

from internlm2.rlhf.reward_metrics import interval
from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import read_records

Verdicts = Mapping[str, Mapping[str, Any]]


def verdict_table(domains: Verdicts, swap: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """A line for each domain, aligned; with `swap` also the accuracy under each condition."""
    conditions = sorted({told for row in (swap or {}).values() for told in row})
    header = ["domain", "pairs", "accuracy", "95% interval", "margin", "score", "calibration", "with length"]
    lines = [header + [f"told {told}" for told in conditions]]
    for domain, found in domains.items():
        low, high = interval(found["accuracy"], found["pairs"])
        lines.append(
            [
                domain,
                f"{found['pairs']:,}",
                f"{found['accuracy']:.1%}",
                f"{low:.1%} .. {high:.1%}",
                f"{found['margin']:+.2f}",
                f"{found['score_mean']:+.2f} +- {found['score_std']:.2f}",
                f"off by {found['calibration_error']:.2f}",
                f"{found['length_correlation']:+.2f}",
                *(f"{swap[domain][told]:.1%}" for told in conditions if swap),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def figures(
    directory: RunDirectory, domains: Verdicts, swap: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Figures of the report by name: accuracy on held-out pairs over the steps, by domain."""
    records = [record for record in read_records(directory.metrics) if record.get("validation")]
    series = []
    for domain in domains:
        points = [(r["step"], r["validation"][domain]["accuracy"]) for r in records if domain in r["validation"]]
        series.append({"label": domain, "x": [step for step, _ in points], "y": [value for _, value in points]})
    notes = []
    for domain, found in domains.items():
        wrong = [value for told, value in swap.get(domain, {}).items() if told != domain]
        low, high = interval(found["accuracy"], found["pairs"])
        note = f"{domain} {found['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        notes.append(note + (f", told another domain {sum(wrong) / len(wrong):.1%}" if wrong else ""))
    accuracy = {
        "title": "Accuracy on held-out pairs",
        "x_label": "step",
        "y_label": "share of pairs",
        "series": series,
        "note": "; ".join(notes),
    }
    return {"reward_accuracy": accuracy} if records else {}
