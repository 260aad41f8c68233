"""Token embedding whose gradient is summed in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """ids [T] int64 -> rows of weight [V, C]."""

    def forward(self, ids: Tensor) -> Tensor:
        return _Embedding.apply(ids, self.weight)


class _Embedding(torch.autograd.Function):
    """torch sums the gradient of a frequent token in bfloat16, where adding 1 to 256 is lost; this sums in float32."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        (ids,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        total.index_add_(0, ids.reshape(-1), grad.reshape(-1, grad.shape[-1]).to(wide))
        return None, total.to(ctx.dtype)
