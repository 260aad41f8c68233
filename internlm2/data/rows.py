"""One packed row as arrays: tokens, shifted labels and the boundaries between documents."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from internlm2.data.shards import Shard

IGNORE = -100


@dataclass(frozen=True)
class Row:
    """T tokens of n segments; a segment is a document or a piece of one."""

    ids: np.ndarray  # [T] int64
    labels: np.ndarray  # [T] int64, -100 = no loss
    cu_seqlens: np.ndarray  # [n + 1] int32
    sources: np.ndarray  # [n] int32, index of the source
    documents: np.ndarray  # [n] int64, number of the document inside its source

    @property
    def tokens(self) -> int:
        """T, at most the `seq_len` of the stream."""
        return len(self.ids)


def build_row(shard: Shard, source: int, segments: Iterable[tuple[int, int, int]]) -> Row:
    """Read the segments (document, first token, length) of one source.

    Each label is the next token of the same document, also across a cut; the last token of a document and masked
    targets have none.
    """
    segments = list(segments)
    total = sum(length for _, _, length in segments)
    ids, labels = np.empty(total, np.int64), np.full(total, IGNORE, np.int64)
    boundaries = np.zeros(len(segments) + 1, np.int32)
    at = 0
    for number, (document, first, length) in enumerate(segments):
        begin = int(shard.offsets[document]) + first
        known = min(
            length + 1, int(shard.offsets[document + 1]) - begin
        )  # one more, for the last label, where the document goes on
        tokens = shard.tokens[begin : begin + known]
        ids[at : at + length] = tokens[:length]
        labels[at : at + known - 1] = tokens[1:]
        if shard.mask is not None:
            labels[at : at + known - 1][shard.mask[begin + 1 : begin + known] != 0] = IGNORE
        at += length
        boundaries[number + 1] = at
    return Row(
        ids=ids,
        labels=labels,
        cu_seqlens=boundaries,
        sources=np.full(len(segments), source, np.int32),
        documents=np.array([document for document, _, _ in segments], np.int64),
    )
