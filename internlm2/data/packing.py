"""Which documents share a row: a packing plan is computed once from the document lengths, cached on disk, and read by
memory map.

`concatenate`: shuffled documents one after another, cut every `seq_len` tokens; every row but the last is full ("longer
documents truncated and the remainder also used", report 3.3.1). `best_fit`: documents stay whole, each in the fullest
row that still has room; longer ones are cut into full rows and their remainder is packed. Either way every token stands
in exactly one row.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np

from internlm2.data.cache import build_once
from internlm2.permutation import shuffled

FORMAT = 1
# Items packed together by best fit: bounds the time that one placement takes and mixes documents of the whole source.
WINDOW = 1 << 18


class PackingPlan:
    """Rows of segments (document, first token, length) on disk."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.rows: int = meta["rows"]
        self.tokens: int = meta["tokens"]
        self.segments: int = meta["segments"]
        self.content: str = meta["content"]

    @cached_property
    def _row_starts(self) -> np.ndarray:
        return np.memmap(self.folder / "rows.bin", np.int64, mode="r")

    @cached_property
    def _segments(self) -> np.ndarray:
        return np.memmap(self.folder / "segments.bin", np.int64, mode="r").reshape(-1, 3)

    def row(self, number: int) -> np.ndarray:
        """[segments of this row, 3] int64: document, first token inside it, length."""
        return self._segments[self._row_starts[number] : self._row_starts[number + 1]]


def plan_rows(
    documents: np.ndarray, lengths: np.ndarray, seq_len: int, packing: str, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pack `documents` [N] of `lengths` [N] tokens into rows of at most `seq_len`; `key` shuffles them first.

    Returns `row_starts` [rows + 1] int64 and `segments` [S, 3] int64 (document, first token, length): row r is
    segments[row_starts[r]:row_starts[r + 1]].
    """
    order = shuffled(len(documents), key)
    documents, lengths = documents[order], lengths[order]
    if packing == "concatenate":
        return _concatenate(documents, lengths, seq_len)
    return _best_fit(documents, lengths, seq_len)


def plan_of(
    folder: Path, documents: np.ndarray, lengths: np.ndarray, seq_len: int, packing: str, key: int
) -> PackingPlan:
    """The plan cached in `folder`, made now if it is not there."""

    def build(temporary: Path) -> None:
        row_starts, segments = plan_rows(documents, lengths, seq_len, packing, key)
        content = hashlib.blake2b(digest_size=16)
        for name, values in (("rows", row_starts), ("segments", segments)):
            values = np.ascontiguousarray(values, dtype="<i8")
            content.update(values.data)
            with open(temporary / f"{name}.bin", "wb") as stream:
                stream.write(values.data)
        meta = {
            "format": FORMAT,
            "rows": len(row_starts) - 1,
            "segments": len(segments),
            "tokens": int(segments[:, 2].sum()),
            "content": content.hexdigest(),
        }
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    return PackingPlan(build_once(folder, _is_complete, build))


def _is_complete(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rows, segments = (folder / "rows.bin").stat().st_size, (folder / "segments.bin").stat().st_size
        return meta["format"] == FORMAT and rows == 8 * (meta["rows"] + 1) and segments == 24 * meta["segments"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _concatenate(documents: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1])
    row_begins = np.arange(0, total, seq_len)
    cuts = np.union1d(begins, row_begins)
    owner = np.searchsorted(begins, cuts, side="right") - 1
    segments = np.stack([documents[owner], cuts - begins[owner], np.diff(cuts, append=total)], axis=1)
    return np.append(np.searchsorted(cuts, row_begins), len(cuts)), segments


def _best_fit(documents: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    full = lengths // seq_len
    owner = np.repeat(np.arange(len(lengths)), full)
    piece = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
    whole_rows = np.stack([documents[owner], piece * seq_len, np.full(len(owner), seq_len)], axis=1)
    rest = lengths - full * seq_len
    kept = rest > 0
    items = np.stack([documents[kept], (full * seq_len)[kept], rest[kept]], axis=1)
    parts, counts = [whole_rows], [np.ones(len(whole_rows), np.int64)]
    for start in range(0, len(items), WINDOW):
        window = items[start : start + WINDOW]
        row = best_fit_decreasing(window[:, 2], seq_len)
        parts.append(window[np.lexsort((-window[:, 2], row))])
        counts.append(np.bincount(row))
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))]), np.concatenate(parts)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """[N] row of each item: longest first, each into the row with the least room that still holds it, or a new row.

    Rows with the same room are kept in one stack, and a bit set says which stacks hold any, so an item costs one bit
    search.
    """
    rows = np.empty(len(lengths), np.int64)
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit r: some row has exactly r tokens of room
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = stacks[room].pop()
            if not stacks[room]:
                occupied ^= 1 << room
        else:
            room, row = capacity, opened
            opened += 1
        rows[item] = row
        left = room - length
        if left:
            if not stacks[left]:
                occupied ^= 1 << left
            stacks[left].append(row)
    return rows
