"""Line figures and heat maps as inline SVG that takes its colours and font from the page, so that one drawing is right
in light and dark.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

# Drawn in these colours, which then become CSS variables of the page.
_INK, _GRID, _STRONG = "#010203", "#040506", "#070809"
_SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
_VARIABLES = {_INK: "var(--ink-soft)", _GRID: "var(--line)", _STRONG: "var(--ink)"}
_VARIABLES |= {colour: f"var(--s{number + 1})" for number, colour in enumerate(_SERIES)}

MOST_POINTS = 500


@dataclass(frozen=True)
class Series:
    """One line; None in `y` leaves a gap. `faint` draws it thin and pale, as the raw curve behind a smoothed one."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    faint: bool = False
    colour: int | None = None


def smooth(values: Sequence[float | None], half_life: float) -> list[float | None]:
    """Mean with weights that halve every `half_life` points on both sides, so that a falling curve is not shown late.

    Gaps stay gaps and carry no weight.
    """
    keep = 0.5 ** (1.0 / half_life)
    before, after = _decayed_sums(values, keep), _decayed_sums(values[::-1], keep)[::-1]
    smoothed: list[float | None] = []
    for value, (total, weight), (later_total, later_weight) in zip(values, before, after, strict=True):
        # Both sums hold the point itself; it counts once.
        both = None if value is None else (total + later_total - value) / (weight + later_weight - 1.0)
        smoothed.append(both)
    return smoothed


def _decayed_sums(values: Sequence[float | None], keep: float) -> list[tuple[float, float]]:
    """(sum, weight) over the values up to each point, the older the lighter."""
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = keep * total + (value or 0.0), keep * weight + (value is not None)
        sums.append((total, weight))
    return sums


def thin(
    x: Sequence[float], y: Sequence[float | None], most: int = MOST_POINTS
) -> tuple[list[float], list[float | None]]:
    """At most about `most` points that keep every peak: the lowest and the highest of each bucket, in order."""
    if len(x) <= most:
        return list(x), list(y)
    size = -(-2 * len(x) // most)
    kept: list[int] = []
    for start in range(0, len(x), size):
        bucket = [i for i in range(start, min(start + size, len(x))) if y[i] is not None]
        if bucket:
            kept += sorted({min(bucket, key=lambda i: y[i] or 0.0), max(bucket, key=lambda i: y[i] or 0.0)})
    if kept[-1:] != [len(x) - 1] and y[-1] is not None:
        kept.append(len(x) - 1)
    return [x[i] for i in kept], [y[i] for i in kept]


def line_figure(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    title: str,
    log_x: bool = False,
    from_zero: bool = False,
    wide: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """An SVG element. `marks`: vertical lines with a word beside them (where a stage begins); `title` is read by
    screen readers.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "internlm2",
        "font.size": 10,
        "path.simplify_threshold": 0.2,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10.0 if wide else 5.6, 3.1), layout="constrained")
        axes: Any = figure.add_subplot()
        for number, line in enumerate(series):
            x, y = thin(line.x, line.y)
            colour = _SERIES[(number if line.colour is None else line.colour) % len(_SERIES)]
            lonely = "o" if len([v for v in y if v is not None]) == 1 else None
            axes.plot(
                x,
                [float("nan") if v is None else v for v in y],
                color=colour,
                label=line.label,
                marker=lonely,
                **({"linewidth": 0.8, "alpha": 0.35} if line.faint else {"linewidth": 1.8}),
            )
        for position, word in marks:
            axes.axvline(position, color=_GRID, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.text(position, 1.0, f" {word}", transform=axes.get_xaxis_transform(), va="top", color=_INK, fontsize=9)
        if log_x:
            axes.set_xscale("log", base=2)
        if from_zero:
            axes.set_ylim(bottom=0)
        if not log_x:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_binary if log_x else _decimal)
        axes.yaxis.set_major_formatter(_decimal)
        axes.set_xlabel(x_label, color=_INK)
        axes.set_ylabel(y_label, color=_INK)
        axes.grid(color=_GRID, linewidth=0.7)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=_INK, which="both")
        shown = [line for line in series if not line.faint]
        if len(shown) > 1:
            handles = [h for h, line in zip(axes.get_lines(), series, strict=False) if not line.faint]
            axes.legend(handles=handles, frameon=False, labelcolor=_INK, fontsize=9)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(text.getvalue(), title)


CELL_WIDTH, CELL_HEIGHT = 62, 24  # of a heat map, SVG units


def heat_map_figure(heat_map: dict[str, Any], *, title: str) -> str:
    """An SVG element: `values` [y][x] in 0..1 as cells that fade from nothing to the page's first colour, each with its
    percentage.
    """
    x, y, values = heat_map["x"], heat_map["y"], heat_map["values"]
    left, top = 52, 8
    width, height = left + len(x) * CELL_WIDTH + 8, top + len(y) * CELL_HEIGHT + 44
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" font-size="11">']
    for row, (label, cells) in enumerate(zip(y, values, strict=True)):
        middle = top + (row + 0.5) * CELL_HEIGHT + 4
        parts.append(f'<text x="{left - 6}" y="{middle:g}" text-anchor="end" fill="{_INK}">{label:g}</text>')
        for column, value in enumerate(cells):
            at = left + column * CELL_WIDTH
            if value is None:
                continue
            parts.append(
                f'<rect x="{at + 1}" y="{top + row * CELL_HEIGHT + 1}" width="{CELL_WIDTH - 2}" '
                f'height="{CELL_HEIGHT - 2}" rx="3" fill="{_SERIES[0]}" fill-opacity="{0.06 + 0.8 * value:.2f}"/>'
                f'<text x="{at + CELL_WIDTH / 2:g}" y="{middle:g}" text-anchor="middle" fill="{_STRONG}">'
                f"{value:.0%}</text>"
            )
    bottom = top + len(y) * CELL_HEIGHT
    for column, label in enumerate(x):
        middle = left + (column + 0.5) * CELL_WIDTH
        parts.append(
            f'<text x="{middle:g}" y="{bottom + 16}" text-anchor="middle" fill="{_INK}">{_binary(label)}</text>'
        )
    centre = left + len(x) * CELL_WIDTH / 2
    label_x, label_y = escape(heat_map["x_label"]), escape(heat_map["y_label"])
    parts.append(f'<text x="{centre:g}" y="{bottom + 36}" text-anchor="middle" fill="{_INK}">{label_x}</text>')
    parts.append(
        f'<text transform="translate(14 {top + len(y) * CELL_HEIGHT / 2:g}) rotate(-90)" text-anchor="middle" '
        f'fill="{_INK}">{label_y}</text></svg>'
    )
    svg = "\n".join(parts)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def heat_map_png(path: Path, heat_map: dict[str, Any], title: str) -> None:
    """The same map as a picture file, for where no browser is."""
    from matplotlib.figure import Figure

    x, y, values = heat_map["x"], heat_map["y"], heat_map["values"]
    figure = Figure(figsize=(2.0 + 0.8 * len(x), 1.6 + 0.3 * len(y)), layout="constrained", dpi=150)
    axes: Any = figure.add_subplot()
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(shown, cmap="YlGnBu", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(x)), [_binary(value) for value in x])
    axes.set_yticks(range(len(y)), [f"{value:g}" for value in y])
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            if value is not None:
                ink = "white" if value > 0.6 else "black"
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color=ink)
    axes.set(xlabel=heat_map["x_label"], ylabel=heat_map["y_label"], title=title)
    figure.colorbar(image, ax=axes, label=heat_map.get("value_label", "share"))
    figure.savefig(path, format="png", metadata={"Software": None})


def _decimal(value: float, position: int | None = None) -> str:
    """Tick label: 4.5, 12k, 3e-4."""
    if value and abs(value) < 0.001:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _binary(value: float, position: int | None = None) -> str:
    """Tick label on a scale of powers of two, as lengths are named: 512, 4k, 32k."""
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _inline(svg: str, title: str) -> str:
    """Cut a matplotlib file down to an element of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="[a-zA-Z.]+[0-9a-z]*_\d+"', "", svg
    )  # names of groups; clip paths and markers have no underscore
    # Tenths of a point are enough for geometry; the words of the labels are left alone.
    svg = re.sub(r'( (?:d|x|y|transform)=")([^"]*)', lambda m: m[1] + re.sub(r"(\.\d)\d+", r"\1", m[2]), svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's own
    svg = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">',
        svg,
        count=1,
    )
    svg = svg.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg)
