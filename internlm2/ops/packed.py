"""Weights laid out once for products that are made a thousand times, as in generation: bfloat16 or float32 on a CPU.

F.linear rearranges a bfloat16 weight at each call, and rounds a float32 row by how many rows stand beside it. Here a
row's result never depends on its neighbours, bit for bit. csrc/common/arguments.h describes the layout.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import internlm2.ops.schemas  # noqa: F401  defines torch.ops.internlm2.*
from internlm2.ops import extension

COLUMNS = 64


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] as panels [ceil(N / 64), lanes, 64 * elements of a lane]; a lane is 32 bits along K."""

    packed: Tensor
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


def pack_weight(weight: Tensor, backend: str = "auto") -> PackedWeight:
    """weight [N, K], bfloat16 or float32."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"the weight must be [out_features, in_features] and not empty, got {list(weight.shape)}.")
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"the weight must be bfloat16 or float32, got {weight.dtype}.")
    weight = weight.detach().contiguous()
    if extension.native("pack_weight", weight.device, backend):
        packed = torch.ops.internlm2.pack_weight(weight)
    else:
        packed = _pack_reference(weight)
    return PackedWeight(packed, *weight.shape)


def unpack_weight(weight: PackedWeight) -> Tensor:
    """The weight [N, K] again."""
    panels, lanes, columns = weight.packed.shape
    wide = weight.packed.view(panels, lanes, COLUMNS, columns // COLUMNS).transpose(1, 2)
    return wide.reshape(panels * COLUMNS, -1)[: weight.out_features, : weight.in_features]


def packed_linear(x: Tensor, weight: PackedWeight, backend: str = "auto") -> Tensor:
    """x [..., K] times the weight's transpose: [..., N]; sums in float32. No gradient."""
    if x.dim() < 1 or x.shape[-1] != weight.in_features:
        raise ValueError(f"x must be [..., {weight.in_features}] for this weight, got {list(x.shape)}.")
    if x.dtype != weight.packed.dtype or x.device != weight.packed.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, the weight {weight.packed.dtype} on {weight.packed.device}.")
    if extension.native("packed_linear", x.device, backend):
        return torch.ops.internlm2.packed_linear(x.contiguous(), weight.packed, weight.out_features, weight.in_features)
    return F.linear(x, unpack_weight(weight))


def _pack_reference(weight: Tensor) -> Tensor:
    per_lane = 4 // weight.element_size()
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % per_lane, 0, -rows % COLUMNS))
    return padded.view(-(-rows // COLUMNS), COLUMNS, -1, per_lane).transpose(1, 2).flatten(2).contiguous()
