"""What a training step receives: packed sequences as torch tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from internlm2.data.rows import IGNORE, Row


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of n sequences (documents or pieces of them), one after another; attention and positions restart at
    each boundary.
    """

    ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64: the token that position t should predict, already shifted; -100 = no loss
    cu_seqlens: torch.Tensor  # [n + 1] int32: boundaries, from 0 to T
    max_seqlen: int
    sources: torch.Tensor  # [n] int32: index into the stream's `source_names`
    documents: torch.Tensor  # [n] int64: document number inside its source

    @cached_property
    def loss_tokens(self) -> int:
        """Number of labels that carry loss."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on another device."""
        names = ("ids", "labels", "cu_seqlens", "sources", "documents")
        moved = replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})
        moved.__dict__["loss_tokens"] = self.loss_tokens  # counted here, so that the device need not be waited for
        return moved


def collate(rows: Sequence[Row]) -> PackedBatch:
    """Rows one after another as one batch."""
    lengths = np.concatenate([np.diff(row.cu_seqlens) for row in rows])
    return PackedBatch(
        ids=torch.from_numpy(np.concatenate([row.ids for row in rows])),
        labels=torch.from_numpy(np.concatenate([row.labels for row in rows])),
        cu_seqlens=torch.from_numpy(np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])),
        max_seqlen=int(lengths.max()),
        sources=torch.from_numpy(np.concatenate([row.sources for row in rows])),
        documents=torch.from_numpy(np.concatenate([row.documents for row in rows])),
    )
