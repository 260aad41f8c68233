"""Ulysses sequence parallelism: s ranks share one packed row; each computes T / s of its tokens, and in attention all
tokens of G / s key/value groups.

Two all-to-alls around attention change one division into the other; everything else works on single tokens. The ranks
of a group receive the same batch, and every result (loss, logits, values) is whole and equal on each of them, while the
gradient that a rank computes is its tokens' part: the parts of the group's ranks add up to the gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceParallel:
    """The group of ranks that share a row. T tokens are padded to s * L, and rank r holds [r * L, (r + 1) * L)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def padding(self, tokens: int) -> int:
        """Tokens that make `tokens` divisible."""
        return -tokens % self.size

    def shard(self, values: Tensor, fill: int) -> Tensor:
        """values [T] (ids or labels) -> this rank's [L]; the padding is `fill`."""
        padded = torch.nn.functional.pad(values, (0, self.padding(len(values))), value=fill)
        return padded.chunk(self.size)[self.rank]

    def pad_sequences(self, cu_seqlens: Tensor, tokens: int) -> Tensor:
        """The padding as one more sequence, which no other sees."""
        padding = self.padding(tokens)
        return torch.cat((cu_seqlens, cu_seqlens[-1:] + padding)) if padding else cu_seqlens

    def scatter_groups(self, qkv: Tensor) -> Tensor:
        """This rank's tokens of all groups [L, G, R + 2, D] -> all tokens of its groups [s * L, G / s, R + 2, D]."""
        return _Exchange.apply(qkv, self.group, self.size, True)

    def gather_heads(self, out: Tensor) -> Tensor:
        """All tokens of this rank's heads [s * L, H / s, D] -> its tokens of all heads [L, H, D]."""
        return _Exchange.apply(out, self.group, self.size, False)

    def gather(self, values: Tensor, tokens: int) -> Tensor:
        """This rank's [L, ...] -> [T, ...], the same on each rank."""
        return _Gather.apply(values, self)[:tokens]

    def sum(self, value: Tensor) -> Tensor:
        """Sum of the ranks' values, the same on each."""
        return _Sum.apply(value, self.group)


def exchange(x: Tensor, group: Any, size: int, to_tokens: bool) -> Tensor:
    """to_tokens: [L, N, ...] -> [size * L, N / size, ...]; else back. N counts groups or heads."""
    if to_tokens:
        send = x.unflatten(1, (size, -1)).movedim(1, 0).contiguous()  # [size, L, N / size, ...]
    else:
        send = x.unflatten(0, (size, -1)).contiguous()  # [size, L, N / size, ...]
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.flatten(0, 1) if to_tokens else received.movedim(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, size: int, to_tokens: bool) -> Tensor:
        ctx.arguments = group, size, not to_tokens
        return exchange(x, group, size, to_tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grad, *ctx.arguments), None, None, None


class _Gather(torch.autograd.Function):
    """Each rank computes the same function of the gathered whole, so its own slice of the gradient is all of its part:
    summing over the ranks would count the loss s times.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: SequenceParallel) -> Tensor:
        ctx.ranks = ranks
        parts = [torch.empty_like(values) for _ in range(ranks.size)]
        dist.all_gather(parts, values.contiguous(), group=ranks.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.ranks.size)[ctx.ranks.rank].contiguous(), None


class _Sum(torch.autograd.Function):
    """As _Gather: the sum's gradient reaches each rank's part once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
