"""What a planned run takes from its data: shown before training, so that a surprising mixture is seen before it
costs anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PoolUse:
    """What a number of rows takes from one pool (a source, or one length bucket of it)."""

    name: str
    source: str
    documents: int
    tokens_per_epoch: int
    rows: int
    tokens: float  # exact for whole epochs, the mean row for the rest
    share: float  # of all planned tokens
    epochs: float


def usage_table(uses: Sequence[PoolUse]) -> str:
    """Aligned text, a line for each pool and the sum."""
    header = ("pool", "documents", "tokens", "planned tokens", "share", "epochs")
    lines = [
        (
            use.name,
            f"{use.documents:,}",
            f"{use.tokens_per_epoch:,}",
            f"{use.tokens:,.0f}",
            f"{use.share:.1%}",
            f"{use.epochs:.2f}",
        )
        for use in uses
    ]
    total = sum(use.tokens for use in uses)
    lines.append(
        (
            "all",
            f"{sum(use.documents for use in uses):,}",
            f"{sum(use.tokens_per_epoch for use in uses):,}",
            f"{total:,.0f}",
            "",
            "",
        )
    )
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in [header, *lines]
    )
