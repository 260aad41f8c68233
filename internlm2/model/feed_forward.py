"""The gated feed-forward layer: w2(silu(w1 x) * w3 x)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm2.ops import Linear


class FeedForward(nn.Module):
    """SwiGLU with the official names: w1 gate, w3 up [intermediate, hidden], w2 down [hidden, intermediate]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.w1 = Linear(hidden_size, intermediate_size, bias=False)
        self.w3 = Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(_GatedSiLU.apply(self.w1(x), self.w3(x)))


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, which keeps gate and up only: silu(gate) is cheap to compute again and as large as either."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
