"""What a suite found, as files that the report shows and that other programs read."""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from internlm2.config.evaluate import EvaluateConfig
from internlm2.evaluate.subject import stage_of
from internlm2.run.atomic import replace_text
from internlm2.run.figures import heat_map_png


@dataclass
class Headline:
    """The one number that a suite is run for. `interval`: 95%, where one can be had."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    better: str = "higher"


@dataclass
class Result:
    """One file of results: at least one of a table (`rows`), a line figure (`figure`) and a heat map.

    figure    {"x_label", "y_label", "series": [{"label", "x", "y"}]}
    heat_map  {"x_label", "y_label", "x": [...], "y": [...], "values": [y][x] in 0..1}
    records   every single item, for <name>.jsonl
    """

    name: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    figure: dict[str, Any] | None = None
    heat_map: dict[str, Any] | None = None
    headline: list[Headline] = field(default_factory=list)
    note: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def content(self, source: str, settings: Any) -> dict[str, Any]:
        """The JSON file; what is not finite is null there. `settings`: the dataclass that it was made with."""
        content: dict[str, Any] = {"title": self.title, "note": self.note, **(self.figure or {})}
        if self.heat_map:
            content["heat_map"] = self.heat_map
        if self.rows:
            content["rows"] = self.rows
        content |= {
            "headline": [asdict(line) for line in self.headline],
            "source": source,
            "settings": OmegaConf.to_container(OmegaConf.structured(settings)),
            "seconds": round(self.seconds, 1),
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        return _finite(content)

    def text(self) -> str:
        """For a terminal."""
        stream = StringIO()
        console = Console(file=stream, width=120, highlight=False)
        console.print(f"\n{self.title}", style="bold")
        rows = self.rows or _map_rows(self.heat_map)
        if rows:
            table = Table(box=None, pad_edge=False)
            for key in rows[0]:
                table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
            for row in rows:
                table.add_row(*(_cell(value) for value in row.values()))
            console.print(table)
        for line in self.headline:
            between = "" if line.interval is None else f"  (95%: {line.interval[0]:.3f} to {line.interval[1]:.3f})"
            console.print(f"{line.name}: {line.value:.4g}{between}", markup=False)
        if self.note:
            console.print(self.note, markup=False)
        return stream.getvalue().rstrip()


def save(result: Result, folder: Path, source: str, settings: Any) -> list[Path]:
    """Write <name>.json, <name>.jsonl with the single items, and a picture of a heat map."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{result.name}.json"]
    content = result.content(source, settings)
    replace_text(written[0], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if result.records:
        written.append(folder / f"{result.name}.jsonl")
        lines = (json.dumps(_finite(record), ensure_ascii=False) for record in result.records)
        replace_text(written[-1], "\n".join(lines) + "\n")
    if result.heat_map:
        written.append(folder / f"{result.name}.png")
        heat_map_png(written[-1], result.heat_map, result.title)
    return written


def output_folder(source: str, config: EvaluateConfig) -> Path:
    """`output`, or evaluation/ of the model's run directory, or evaluations/<name>."""
    if config.output is not None:
        return Path(config.output).expanduser()
    stage = stage_of(source)
    if stage is not None:
        return stage / "evaluation"
    return Path("evaluations") / re.sub(r"[^\w.-]+", "_", source.strip("/"))


def _map_rows(heat_map: dict[str, Any] | None) -> list[dict[str, Any]]:
    if heat_map is None:
        return []
    corner = f"{heat_map['y_label']} \\ {heat_map['x_label']}"
    return [
        {corner: f"{y:g}", **{f"{x:,}": f"{value:.0%}" for x, value in zip(heat_map["x"], row)}}
        for y, row in zip(heat_map["y"], heat_map["values"])
    ]


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
