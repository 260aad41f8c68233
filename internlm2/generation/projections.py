"""Linear layers laid out for decoding: few rows, the same weights a thousand times over.

A projection is a function x [M, K] -> [M, N]. On CPU the weights are packed once for oneDNN: F.linear packs bfloat16
weights anew on each call, which makes it 1.2 to 2.3 times slower up to 32 rows. The packed product also has a property
that F.linear lacks in float32: a row's result does not depend on how many other rows there are, bit for bit.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm2.config import ConfigError
from internlm2.ops import quantize_weight, quantized_linear

Projection = Callable[[Tensor], Tensor]
QUANTIZATIONS = ("none", "w8", "w4")
# The layout that oneDNN chooses for this many rows is as good as the best from 1 to 512 rows (measured on AVX-512).
PACKED_FOR_ROWS = 64
# Rounding activations to 8 bits as well adds 0.7 % to a product's error; 4-bit weights themselves cost 8 %.
ACT_BITS = 8


def projection(weights: Sequence[Tensor], dtype: torch.dtype, quantize: str = "none") -> Projection:
    """One projection from weights [N_i, K] stacked along N, with products in `dtype`."""
    if quantize not in QUANTIZATIONS:
        raise ConfigError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r}.")
    weights = [weight.detach() for weight in weights]
    if quantize != "none":
        return _quantized(weights, dtype, quantize)
    if weights[0].device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and packing_works():
        return _Packed(_stacked(weights, dtype))
    if len(weights) == 1:
        return functools.partial(_linear, weight=weights[0].to(dtype))
    return functools.partial(_linear, weight=_stacked(weights, dtype))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return weights[0].to(dtype) if len(weights) == 1 else torch.cat([weight.to(dtype) for weight in weights])


class _Packed:
    def __init__(self, weight: Tensor):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        # A single float32 row takes another code path in oneDNN, with other rounding.
        self.smallest_rows = 2 if weight.dtype == torch.float32 else 1
        self.product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) >= self.smallest_rows:
            return self.product(x, self.weight, None, "none", [], "")
        return self.product(x.expand(2, -1).contiguous(), self.weight, None, "none", [], "")[:1]


def _quantized(weights: Sequence[Tensor], dtype: torch.dtype, quantize: str) -> Projection:
    packed = quantize_weight(_stacked(weights, dtype), bits=8 if quantize == "w8" else 4)
    return functools.partial(quantized_linear, weight=packed, act_bits=ACT_BITS)


@functools.cache
def packing_works() -> bool:
    """True where this torch has oneDNN's packed product with the signature that is used here, and it is right.

    Both operators are private to torch (its inductor uses them), hence the check of their numbers at first use.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=draw) for shape in ((5, 72), (56, 72)))
    try:
        exact = x.double() @ weight.double().t()
        found = [_Packed(weight)(x), _Packed(weight.bfloat16())(x.bfloat16())]
    except (RuntimeError, TypeError):  # no bfloat16 on this processor, or another signature in a later torch
        return False
    return all(torch.allclose(y.double(), exact, atol=bound) for y, bound in zip(found, (1e-4, 0.25)))
