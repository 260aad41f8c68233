"""What one stage's directory says about its run: the numbers and tables that the report shows."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import read_records
from internlm2.run.provenance import read_provenance

log = logging.getLogger(__name__)


@dataclass
class StageSummary:
    """Everything that a page shows of one stage; a file that is absent leaves its field empty."""

    name: str
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    config: str
    samples: dict[str, str] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)
    handover: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """How the last start ended: finished, stopped, failed; `running or killed` where nothing was noted."""
        end = self.starts[-1].get("end") if self.starts else None
        return str(end["status"]) if end else "running or killed"

    @property
    def predicts_tokens(self) -> bool:
        """Is the loss a next-token loss, of so many nats a token?"""
        return not any("accuracy" in record for record in self.metrics[:1])

    @property
    def steps(self) -> int:
        """Steps with a record."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def tokens(self) -> int:
        """Tokens that the recorded steps trained on."""
        return sum(int(record.get("tokens") or 0) for record in self.timing)

    @property
    def seconds(self) -> float:
        """Time inside the recorded steps, without validation, saving and starts."""
        return float(sum(record.get("seconds") or 0.0 for record in self.timing))

    def typical(self, key: str) -> float | None:
        """Median of a timing value over the steps that have it; the first step, which warms everything up, is left
        out.
        """
        values = [record[key] for record in self.timing[1:] or self.timing if record.get(key) is not None]
        return median(values) if values else None

    def column(self, key: str) -> list[float | None]:
        """One metric over the steps; None where a record lacks it or it was not finite."""
        return [record.get(key) for record in self.metrics]

    def last(self, key: str, count: int = 20) -> float | None:
        """Mean of a metric over the last `count` records that have it."""
        values = [value for value in self.column(key) if value is not None][-count:]
        return sum(values) / len(values) if values else None

    def validation(self) -> dict[str, tuple[list[int], list[float | None]]]:
        """Validation loss (nats a token) by source: {source: (steps, losses)}. Stages without such a loss (PPO) draw
        figures of their own.
        """
        curves: dict[str, tuple[list[int], list[float | None]]] = {}
        for record in self.metrics:
            for source, measured in (record.get("validation") or {}).items():
                if not isinstance(measured, dict) or "loss" not in measured:
                    continue
                steps, losses = curves.setdefault(source, ([], []))
                steps.append(record["step"])
                losses.append(measured["loss"])
        return curves

    def last_validation(self) -> dict[str, dict[str, Any]]:
        """What the last validation measured, by source: loss, bits_per_byte, tokens."""
        return next((r["validation"] for r in reversed(self.metrics) if r.get("validation")), {})

    def not_applied(self) -> list[dict[str, Any]]:
        """Records of steps whose update was refused."""
        return [record for record in self.metrics if record.get("applied") is False]


def read_stage(path: Path, name: str | None = None) -> StageSummary:
    """Read a stage's run directory; `name`: what to call it, by default as the directory is called."""
    run = RunDirectory(path)
    stage = StageSummary(
        name=name or path.name,
        metrics=read_records(run.metrics),
        timing=read_records(run.timing),
        starts=read_provenance(run)["starts"],
        config=run.config.read_text() if run.config.exists() else "",
    )
    stage.samples = {f.stem: f.read_text(errors="replace") for f in sorted(run.samples.glob("*.txt"))}
    stage.data = _read_rows(path / "data.json", stage.problems)
    stage.handover = _read_rows(path / "handover.json", stage.problems)
    for file in sorted(run.evaluation.glob("*.json")):
        figure = _read_json(file, stage.problems)
        fault = None if figure is None else figure_fault(figure)
        if fault:
            stage.problems.append(f"{file.name} is no figure: {fault}.")
        elif figure is not None:
            stage.figures.append(figure)
    stage.problems += _read_sentences(path / "sanity.json", stage.problems)
    for problem in stage.problems:
        log.warning("report of %s: %s", path, problem)
    return stage


def _read_sentences(path: Path, problems: list[str]) -> list[str]:
    """What looked wrong at the end of a PPO round, in words."""
    content = _read_json(path, problems) if path.exists() else []
    return [str(sentence) for sentence in content or []]


def figure_fault(figure: Any) -> str | None:
    """What keeps `figure` from being one that the report shows, or None. It has a title and at least one of

    series    with x_label and y_label: [{"label", "x", "y"}]
    heat_map  {"x_label", "y_label", "x", "y", "values": [y][x] in 0..1 or null}
    rows      a table: objects with the same keys
    """
    if not isinstance(figure, dict):
        return "it is not an object"
    if "title" not in figure:
        return "it has no title"
    if not {"series", "heat_map", "rows"} & figure.keys():
        return "it has no series"
    if "heat_map" in figure:
        return _heat_map_fault(figure["heat_map"])
    missing = [key for key in ("x_label", "y_label") if "series" in figure and key not in figure]
    if missing:
        return f"it has no {missing[0]}"
    for line in figure.get("series", []):
        if not isinstance(line, dict) or not {"label", "x", "y"} <= line.keys():
            return "a series lacks label, x or y"
        if len(line["x"]) != len(line["y"]):
            return f"series {line['label']!r} has {len(line['x'])} x and {len(line['y'])} y"
    if not all(isinstance(row, dict) for row in figure.get("rows", [])):
        return "a row of its table is no object"
    return None


def _heat_map_fault(heat_map: Any) -> str | None:
    keys = {"x_label", "y_label", "x", "y", "values"}
    if not isinstance(heat_map, dict) or not keys <= heat_map.keys():
        return f"its heat_map lacks one of {', '.join(sorted(keys))}"
    if [len(row) for row in heat_map["values"]] != [len(heat_map["x"])] * len(heat_map["y"]):
        return f"its heat_map has no {len(heat_map['y'])} rows of {len(heat_map['x'])} values"
    return None


def _read_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """A list of objects, bare or under "rows"."""
    content = _read_json(path, problems) if path.exists() else []
    rows = content.get("rows", []) if isinstance(content, dict) else content
    return [row for row in rows or [] if isinstance(row, dict)]


def _read_json(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        problems.append(f"{path.name} is no JSON: {error}.")
        return None
