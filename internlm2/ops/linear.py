"""nn.Linear that takes the fastest product for its shape on a CPU.

On AMD processors torch's float32 F.linear goes through MKL, which runs its AVX2 code there; oneDNN, also inside torch,
runs AVX-512: about 2x faster on Zen 5 in forward and both gradients, 1.1x on Zen 4 (benchmarks/kernels.py). The choice
depends on the processor and on shapes only, never on a timing, so that a resumed run takes the same path bit for bit.

bfloat16 with a few rows and no gradient, as in decoding, goes through our own kernel where it is built: torch
rearranges the weight at each call, which costs more than reading it. From 8 rows on torch is as fast.

On processors without bfloat16 instructions torch's bfloat16 product is many times slower than its float32 one: there
the operands are widened, multiplied in float32 and the result is rounded once, forward and backward.
"""

import functools
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import internlm2.ops.schemas  # noqa: F401  defines torch.ops.internlm2.*
from internlm2.ops import extension
from internlm2.ops.processor import widens

# Fewer rows are bound by reading the weight, and oneDNN would copy its transpose for the gradient to the input.
SMALLEST_ROWS = 32
MOST_DECODED_ROWS = 4

# oneDNN, and torch's layer above it, each keep a compiled product for the last 1,024 shapes. Packed batches have other
# numbers of rows at each step: with a toy model resident memory rose from 0.4 to 1.2 GiB in 100 steps. A step's own
# shapes, each of which serves all layers, are about 15. Both are read at the first product.
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")


class Linear(nn.Linear):
    """Drop-in nn.Linear with the same parameters and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        if _wants_onednn(input, self.weight, self.bias) and onednn_float32():
            return _OneDNNLinear.apply(input, self.weight)
        if _wants_few_rows(input, self.weight, self.bias) and extension.loaded("cpu"):
            return torch.ops.internlm2.few_rows_linear(input.contiguous(), self.weight)
        if _wants_float32(input, self.weight, self.bias):
            return _WidenedLinear.apply(input, self.weight)
        return F.linear(input, self.weight, self.bias)


def _wants_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and bias is None
        and x.dim() >= 2
        and x.numel() >= SMALLEST_ROWS * x.shape[-1]
        and x.shape[-1] == weight.shape[-1]
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
    )


def _wants_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and bias is None
        and x.dim() >= 1
        and 0 < x.numel() <= MOST_DECODED_ROWS * x.shape[-1]
        and x.shape[-1] == weight.shape[-1]
        and weight.stride(-1) == 1
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
    )


def _wants_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        widens(x, weight)
        and bias is None
        and x.dim() >= 1
        and x.shape[-1] == weight.shape[-1]
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [N, K]^T -> [M, N] in oneDNN's float32."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


@functools.cache
def onednn_float32() -> bool:
    """True where oneDNN is the faster float32 library and its answers, gradients included, agree with MKL's.

    The operator is private to torch (its inductor uses it), hence the check of its numbers at first use.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() != "AuthenticAMD":
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    draw = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=draw) for shape in ((40, 72), (56, 72), (40, 56)))
    try:
        pairs = (
            (_product(x, weight), x.double() @ weight.double().t()),
            (_product(grad, weight.t()), grad.double() @ weight.double()),
            (_product(grad.t(), x.t()), grad.double().t() @ x.double()),
        )
    except (RuntimeError, TypeError):  # another signature in a later torch
        return False
    return all(torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-4) for ours, exact in pairs)


def _vendor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "unknown")


class _OneDNNLinear(torch.autograd.Function):
    """x [..., K], weight [N, K] -> [..., N]; oneDNN's operator has no autograd of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(grad_rows, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = _product(grad_rows.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


class _WidenedLinear(torch.autograd.Function):
    """x [..., K], weight [N, K] -> [..., N], bfloat16 through float32 products; keeps the bfloat16 operands alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.float().reshape(-1, grad.shape[-1])
        grad_x = (rows @ weight.float()).to(x.dtype).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.float().reshape(-1, x.shape[-1])).to(weight.dtype)
        return grad_x, grad_weight
