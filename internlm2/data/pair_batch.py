"""What a step of the reward model receives: packed sequences, and which of them was preferred to which."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class PairBatch:
    """T tokens of m sequences, one after another without padding, and n pairs of them. Each ends with the reward token.

    An answer that stands in several pairs is one sequence.
    """

    ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [m + 1] int32: boundaries, from 0 to T
    max_seqlen: int
    sources: torch.Tensor  # [m] int32: index into the stream's `source_names`
    chosen: torch.Tensor  # [n] int64: index of a sequence
    rejected: torch.Tensor  # [n] int64
    gaps: torch.Tensor  # [n] float32: by how much the judge preferred it, on the judge's scale
    pairs: tuple[int, ...]  # [n] numbers of the pairs in their table

    @property
    def loss_tokens(self) -> int:
        """Number of pairs: the loss is averaged over them."""
        return len(self.pairs)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PairBatch":
        """The same batch on another device."""
        names = ("ids", "cu_seqlens", "sources", "chosen", "rejected", "gaps")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return replace(self, **moved)


def collate_pairs(
    sequences: Mapping[int, tuple[Sequence[int] | np.ndarray, int]],
    pairs: Iterable[tuple[int, int, int, float]],
    filler: int,
) -> PairBatch:
    """`sequences`: number -> (ids, source); `pairs`: (pair, chosen sequence, rejected sequence, gap).

    Without sequences it is a batch of no pair, with one token `filler`: where several ranks work together, each has to
    take part in every forward pass.
    """
    pairs = list(pairs)
    place = {number: index for index, number in enumerate(sequences)}
    parts = [np.asarray(ids, np.int64) for ids, _ in sequences.values()] or [np.array([filler], np.int64)]
    lengths = np.array([len(part) for part in parts], np.int64)
    return PairBatch(
        ids=torch.from_numpy(np.concatenate(parts)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        sources=torch.tensor([source for _, source in sequences.values()] or [0], dtype=torch.int32),
        chosen=torch.tensor([place[chosen] for _, chosen, _, _ in pairs], dtype=torch.int64),
        rejected=torch.tensor([place[rejected] for _, _, rejected, _ in pairs], dtype=torch.int64),
        gaps=torch.tensor([gap for _, _, _, gap in pairs], dtype=torch.float32),
        pairs=tuple(pair for pair, _, _, _ in pairs),
    )
