"""Loss by position: does a model use a context longer than what it was trained on?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from internlm2.data.batch import collate
from internlm2.data.rows import Row
from internlm2.model.transformer import CausalLM


@dataclass
class LossByPosition:
    """Mean loss (nats a token) in bins of `width` positions; NaN where a bin has no token."""

    width: int
    loss: list[float]
    tokens: list[int]

    def mean(self, first: int) -> float:
        """Mean loss of all tokens in bins that start at position `first` or later."""
        chosen = [i for i in range(len(self.loss)) if i * self.width >= first and self.tokens[i]]
        total = sum(self.tokens[i] for i in chosen)
        return sum(self.loss[i] * self.tokens[i] for i in chosen) / total if total else math.nan


@torch.no_grad()
def loss_by_position(
    model: CausalLM, rows: Mapping[str, Sequence[Row]], seq_len: int, bins: int = 32
) -> LossByPosition:
    """Over rows that each hold the beginning of one document, so that position t has t tokens of context."""
    width = max(1, seq_len // bins)
    total, count = (
        torch.zeros(-(-seq_len // width), dtype=torch.float64),
        torch.zeros(-(-seq_len // width), dtype=torch.int64),
    )
    was_training = model.training
    model.eval()
    for row in (row for part in rows.values() for row in part):
        batch = collate([row]).to(model.output_weight.device)
        losses = model.token_losses(batch.ids, batch.labels, batch.cu_seqlens, batch.max_seqlen).double().cpu()
        valid = batch.labels.cpu() >= 0
        at = torch.arange(len(losses))[valid] // width
        total.index_add_(0, at, losses[valid])
        count.index_add_(0, at, torch.ones_like(at))
    model.train(was_training)
    return LossByPosition(width, (total / count).tolist(), count.tolist())
