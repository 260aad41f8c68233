"""The pieces that a page is made of."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any


def figure(svg: str, caption: str, *, wide: bool = False) -> str:
    """A drawing with its caption; `wide` takes the page's whole width."""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one table; a column of numbers is set to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(isinstance(r.get(c), (int, float, type(None))) for r in rows)}
    align = {c: ' class="number"' if c in numeric else "" for c in columns}
    head = "".join(f"<th{align[c]}>{escape(c)}</th>" for c in columns)
    lines = ["".join(f"<td{align[c]}>{cell(row.get(c))}</td>" for c in columns) for row in rows]
    return (
        f'<div class="scroll"><table><tr>{head}</tr>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
    )


def cell(value: Any) -> str:
    """A value as the page shows it; what is not finite stays empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else ""
    return escape(value if isinstance(value, str) else str(value))
