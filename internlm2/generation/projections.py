"""Linear layers laid out for decoding: few rows, the same weights a thousand times over.

On CPU the weights are packed once, by our own kernels where they are built, else by oneDNN: F.linear packs bfloat16
weights anew on each call. Either packed product has a property that F.linear lacks in float32: a row's result does not
depend on how many other rows there are, bit for bit.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm2.config import ConfigError
from internlm2.ops import (
    PackedWeight,
    Projection,
    QuantizedWeight,
    extension,
    pack_weight,
    packed_linear,
    quantize_weight,
    quantized_linear,
)

QUANTIZATIONS = ("none", "w8", "w4")
# Rounding activations to 8 bits as well adds 0.7 % to a product's error; 4-bit weights themselves cost 8 %.
ACT_BITS = 8
# The layout that oneDNN chooses for this many rows is as good as the best from 1 to 512 rows (measured on AVX-512).
PACKED_FOR_ROWS = 64


def projection(weights: Sequence[Tensor], dtype: torch.dtype, quantize: str = "none") -> Projection:
    """One projection from weights [N_i, K] stacked along N, with products in `dtype`."""
    if quantize not in QUANTIZATIONS:
        raise ConfigError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r}.")
    stacked = _stacked([weight.detach() for weight in weights], dtype)
    if quantize != "none":
        return Quantized(quantize_weight(stacked, bits=8 if quantize == "w8" else 4))
    if stacked.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        if extension.native("packed_linear", stacked.device):
            return Packed(pack_weight(stacked))
        if onednn_packing_works():
            return OneDNN(stacked)
    return Plain(stacked)


def _stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return weights[0].to(dtype) if len(weights) == 1 else torch.cat([weight.to(dtype) for weight in weights])


@dataclass(frozen=True)
class Packed:
    weight: PackedWeight

    def __call__(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight)


@dataclass(frozen=True)
class Quantized:
    weight: QuantizedWeight

    def __call__(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, ACT_BITS)


@dataclass(frozen=True)
class Plain:
    """F.linear: on a GPU, and for dtypes that nothing is packed for."""

    plain: Tensor
    weight: None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.plain)


class OneDNN:
    """Packed by oneDNN, where our own kernels are not built."""

    weight: None = None

    def __init__(self, weight: Tensor):
        self.reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        # A single float32 row takes another code path in oneDNN, with other rounding.
        self.smallest_rows = 2 if weight.dtype == torch.float32 else 1
        self.product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) >= self.smallest_rows:
            return self.product(x, self.reordered, None, "none", [], "")
        return self.product(x.expand(2, -1).contiguous(), self.reordered, None, "none", [], "")[:1]


@functools.cache
def onednn_packing_works() -> bool:
    """True where this torch has oneDNN's packed product with the signature that is used here, and it is right.

    Both operators are private to torch (its inductor uses them), hence the check of their numbers at first use.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=draw) for shape in ((5, 72), (56, 72)))
    try:
        exact = x.double() @ weight.double().t()
        found = [OneDNN(weight)(x), OneDNN(weight.bfloat16())(x.bfloat16())]
    except (RuntimeError, TypeError):  # no bfloat16 on this processor, or another signature in a later torch
        return False
    return all(torch.allclose(y.double(), exact, atol=bound) for y, bound in zip(found, (1e-4, 0.25)))
