"""What was measured of a stage: its figures, maps and tables, and in few words what the stage gained."""

from collections.abc import Sequence
from html import escape
from typing import Any

from internlm2.run.figures import Series, heat_map_figure, line_figure
from internlm2.run.page_elements import figure, table
from internlm2.run.stage_summary import StageSummary

MOST_GAINS = 6


def evaluation(figures: Sequence[dict[str, Any]]) -> list[str]:
    """The section: drawings side by side, then tables under their titles."""
    drawn = [found for found in figures if "series" in found or "heat_map" in found]
    parts = [_drawing(found, wide=len(drawn) % 2 == 1 and found is drawn[-1]) for found in drawn]
    section = [f'<div class="figures">{"".join(parts)}</div>'] if parts else []
    for found in figures:
        if found.get("rows"):
            section.append(f'<p class="soft">{escape(_caption(found))}</p>{table(found["rows"])}')
    return ["<h3>Evaluation</h3>", *section] if section else []


def gains(stage: StageSummary) -> list[str]:
    """The stage's own numbers, before and after where both are known, then the headlines of its evaluations."""
    said = []
    losses = [loss for loss in stage.column("loss") if loss is not None]
    if losses:
        said.append(f"training loss {losses[0]:.3f} → {stage.last('loss'):.3f}")
    for source, (_, values) in stage.validation().items():
        known = [value for value in values if value is not None]
        if len(known) > 1:
            said.append(f"held-out {source} {known[0]:.3f} → {known[-1]:.3f}")
        elif known:
            said.append(f"held-out {source} {known[0]:.3f}")
    scores = [value for value in stage.column("score") if value is not None]
    if scores:
        said.append(f"score {scores[0]:.3f} → {stage.last('score'):.3f}")
    for found in stage.figures:
        for line in found.get("headline") or []:
            said.append(f"{line['name']} {line['value']:.3g}")
    for found in stage.figures:
        if found.get("note") and "series" in found and "headline" not in found:
            said.append(str(found["note"]))
    return said if len(said) <= MOST_GAINS else [*said[:MOST_GAINS], f"and {len(said) - MOST_GAINS} more"]


def _drawing(found: dict[str, Any], *, wide: bool) -> str:
    if "heat_map" in found:
        return figure(heat_map_figure(found["heat_map"], title=found["title"]), _caption(found), wide=wide)
    lines = [Series(line["label"], line["x"], line["y"]) for line in found["series"]]
    svg = line_figure(
        lines,
        found["x_label"],
        found["y_label"],
        title=found["title"],
        wide=wide,
        log_x=found.get("x_scale") == "log",
    )
    return figure(svg, _caption(found), wide=wide)


def _caption(found: dict[str, Any]) -> str:
    return found["title"] + (f": {found['note']}" if found.get("note") else "")
