"""What each rank of a job owns: rows of every step, and pieces of every parameter: arithmetic, checked for gaps."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from internlm2.config import ConfigError


class Piece(NamedTuple):
    """Elements `start` to `start + length` of a flattened parameter."""

    name: str
    start: int
    length: int


def rows_of(position: int, rows: int, rank: int, ranks: int) -> range:
    """The rows that a rank takes of the step at `position`."""
    return range(position + rank, position + rows, ranks)


def check_rows(position: int, rows: int, ranks: int) -> None:
    """Every row of the step belongs to exactly one rank. Raises ConfigError."""
    seen = sorted(row for rank in range(ranks) for row in rows_of(position, rows, rank, ranks))
    if seen != list(range(position, position + rows)):
        raise ConfigError(f"The {rows} rows of a step do not divide over {ranks} ranks without a gap or an overlap.")


def flat_pieces(groups: Iterable[Mapping[str, int]], ranks: int, alignment: int) -> list[list[Piece]]:
    """ZeRO 1 and 2, by rank: each group's parameters one after another, padded, cut into equal partitions.

    `groups` gives sizes by name in DeepSpeed's order; the padded length is a multiple of `ranks` * `alignment`.
    """
    owned: list[list[Piece]] = [[] for _ in range(ranks)]
    for sizes in groups:
        total = sum(sizes.values())
        unit = ranks * alignment
        partition = -(-total // unit) * unit // ranks
        start = 0
        for name, size in sizes.items():
            for rank in range(start // partition, (start + size - 1) // partition + 1):
                low, high = max(start, rank * partition), min(start + size, (rank + 1) * partition)
                owned[rank].append(Piece(name, low - start, high - low))
            start += size
    return owned


def sharded_pieces(shapes: Mapping[str, Sequence[int]], ranks: int) -> list[list[Piece]]:
    """ZeRO 3, by rank: every parameter cut into equal shards, the last ones short or empty."""
    owned: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, shape in shapes.items():
        size = prod(shape)
        shard = -(-size // ranks)
        for rank in range(-(-size // shard)):
            owned[rank].append(Piece(name, rank * shard, min(shard, size - rank * shard)))
    return owned


def check_cover(owned: Iterable[Iterable[Piece]], shapes: Mapping[str, Sequence[int]]) -> None:
    """The pieces of all ranks cover every parameter exactly once: the checkpoint's index has no hole. ConfigError."""
    by_name: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for pieces in owned:
        for piece in pieces:
            by_name[piece.name].append((piece.start, piece.length))
    for name, shape in shapes.items():
        end = 0
        for start, length in sorted(by_name[name]):
            if start != end:
                raise ConfigError(
                    f"{name}: elements {min(start, end)} to {max(start, end)} belong to no rank, or to two."
                )
            end = start + length
        if end != prod(shape):
            raise ConfigError(f"{name}: the ranks own {end} of its {prod(shape)} elements.")
