"""Rows of the plan's tables: a title and one value for each setting."""

from collections.abc import Iterable, Sequence

from internlm2.plan.layout import Layout

GIB = 2**30


def parts_table(parts: Sequence[dict[str, float]], unit: float, prefix: str = "", digits: int = 2) -> list[str]:
    """A row for each component that any of the settings has, and their sums."""
    names = list(dict.fromkeys(name for one in parts for name in one))
    lines = [
        row(prefix + name, [f"{one[name] / unit:,.{digits}f}" if name in one else "-" for one in parts])
        for name in names
    ]
    if not prefix:
        lines.append(row("sum", [f"{sum(one.values()) / unit:,.{digits}f}" for one in parts]))
    return lines


def engine_name(layout: Layout) -> str:
    """The engine, with the sharding group and offload where they are not the default."""
    if layout.zero == 0:
        return "single"
    group = layout.gather if layout.zero == 3 else layout.shard
    words = [f"zero{layout.zero}"]
    if 0 < group < layout.gpus:
        words.append(f"over {group}")
    if layout.offload:
        words.append("offload")
    return " ".join(words)


def row(title: str, values: Iterable[str]) -> str:
    return f"  {title:32}" + "".join(f"{value:>32}" for value in values)
