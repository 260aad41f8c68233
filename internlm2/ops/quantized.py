"""Weights in 4 or 8 bits: quantise, give back, and multiply without giving back first.

weight = (code - zero) * scale, a scale (and a zero point, unless symmetric) for each output feature and group of 128
inputs. N output features, K inputs. The layout, one for every device, is described in csrc/common/quantized.h.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import internlm2.ops.schemas  # noqa: F401  defines torch.ops.internlm2.*
from internlm2.ops import extension

GROUP, TILE = 128, 16


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] in `bits` bits: packed uint8, scales bfloat16, zeros uint8 (empty if symmetric)."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    out_features: int
    in_features: int

    @property
    def symmetric(self) -> bool:
        return self.zeros.numel() == 0

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.zeros.nbytes

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        return replace(self, packed=self.packed.to(device), scales=self.scales.to(device), zeros=self.zeros.to(device))

    def _arguments(self) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
        return self.packed, self.scales, self.zeros, self.bits, self.out_features, self.in_features


def quantize_weight(weight: Tensor, bits: int = 4, symmetric: bool = True, backend: str = "auto") -> QuantizedWeight:
    """Rounds weight [N, K] (bfloat16 or float32) to 4 or 8 bits. A group with NaN or infinity comes back as NaN."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}.")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"the weight must be [out_features, in_features] and not empty, got {list(weight.shape)}.")
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"the weight must be bfloat16 or float32, got {weight.dtype}.")
    weight = weight.detach()
    if extension.native("quantize_weight", weight.device, backend):
        packed, scales, zeros = torch.ops.internlm2.quantize_weight(weight.contiguous(), bits, symmetric)
    else:
        packed, scales, zeros = _quantize_reference(weight, bits, symmetric)
    rows, columns = weight.shape
    return QuantizedWeight(packed, scales, zeros, bits, rows, columns)


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16, backend: str = "auto") -> Tensor:
    """The weight [N, K] that the codes stand for, bfloat16 or float32."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dequantize_weight gives bfloat16 or float32, not {dtype}.")
    if extension.native("dequantize_weight", weight.packed.device, backend):
        return torch.ops.internlm2.dequantize_weight(*weight._arguments(), dtype == torch.float32)
    return _dequantize_reference(weight).to(dtype)


def quantized_linear(x: Tensor, weight: QuantizedWeight, act_bits: int = 16, backend: str = "auto") -> Tensor:
    """x [..., K] times the weight's transpose: [..., N] in x's dtype (bfloat16 or float32).

    act_bits 16 rounds activations to bfloat16, 8 to int8 with a scale for each token and group of 128; the CUDA kernels
    multiply in bfloat16 only, and take 8 as 16. Sums are float32. Gradient flows to x, through the dequantised weight;
    rounding the activations counts as the identity.
    """
    if act_bits not in (8, 16):
        raise ValueError(f"act_bits must be 8 or 16, got {act_bits}.")
    if x.dim() < 1 or x.shape[-1] != weight.in_features:
        raise ValueError(f"x must be [..., {weight.in_features}] for this weight, got {list(x.shape)}.")
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"x must be bfloat16 or float32, got {x.dtype}.")
    if x.device != weight.packed.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.packed.device}.")
    if extension.native("quantized_linear", x.device, backend):
        act_bits = 16 if x.is_cuda else act_bits
        return torch.ops.internlm2.quantized_linear(x.contiguous(), *weight._arguments(), act_bits)
    rounded = x + (_round_activations(x.detach(), act_bits) - x).detach()  # straight through
    return F.linear(rounded.float(), _dequantize_reference(weight)).to(x.dtype)


def _round_away(x: Tensor) -> Tensor:
    """float32 to the next bfloat16 that is not smaller in magnitude."""
    bits = (x.float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + 0xFFFF
    return (bits >> 16).to(torch.uint16).view(torch.bfloat16)


def _quantize_reference(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    tiles, groups = -(-rows // TILE), -(-columns // GROUP)
    padded = F.pad(weight.float(), (0, groups * GROUP - columns, 0, tiles * TILE - rows))
    x = padded.view(tiles, TILE, groups, GROUP).transpose(1, 2)  # [tiles, groups, 16, 128]
    finite = x.nan_to_num(0.0, 0.0, 0.0)
    poison = (x * 0.0).sum(-1)  # NaN where a group holds NaN or infinity
    top, bottom = finite.amax(-1).clamp_min(0.0), finite.amin(-1).clamp_max(0.0)
    steps = 15.0 if bits == 4 else 255.0
    furthest = torch.where(top >= -bottom, top, bottom)
    if not symmetric:
        scales = _round_away((top - bottom) / steps + poison)
        zeros = torch.where(scales != 0, (-bottom / scales.float()).round(), 0.0).nan_to_num(0.0).clamp(0.0, steps)
    else:
        # Of 4 bits, the side that reaches further takes the code that has no mirror image, -8.
        scales = _round_away((furthest / -8.0 if bits == 4 else furthest.abs() / 127.0) + poison)
        zeros = torch.full_like(top, 8.0 if bits == 4 else 128.0)
    codes = (x / scales.float()[..., None]).nan_to_num(0.0).clamp(-512.0, 512.0).round() + zeros[..., None]
    codes = codes.clamp(0.0, steps).to(torch.uint8)
    stored = zeros.to(torch.uint8) if not symmetric else torch.empty(0, dtype=torch.uint8, device=weight.device)
    return _pack(codes, bits), scales, stored


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [tiles, groups, 16, 128] -> [tiles, groups, 256 * bits]: blocks of one 32-bit word a channel."""
    tiles, groups = codes.shape[:2]
    if bits == 4:
        halves = codes.view(tiles, groups, TILE, 16, 2, 4)
        codes = halves[..., 0, :] | (halves[..., 1, :] << 4)
    words = codes.reshape(tiles, groups, TILE, -1, 4)
    return words.transpose(2, 3).reshape(tiles, groups, -1).contiguous()


def _dequantize_reference(weight: QuantizedWeight) -> Tensor:
    tiles, groups = weight.packed.shape[:2]
    words = weight.packed.view(tiles, groups, -1, TILE, 4).transpose(2, 3)  # [tiles, groups, 16, blocks, 4]
    if weight.bits == 4:
        words = torch.stack((words & 15, words >> 4), dim=-2)
    codes = words.reshape(tiles, groups, TILE, GROUP).float()
    zeros = weight.zeros.float()[..., None] if not weight.symmetric else (8.0 if weight.bits == 4 else 128.0)
    values = (codes - zeros) * weight.scales.float()[..., None]
    return values.transpose(1, 2).reshape(tiles * TILE, groups * GROUP)[: weight.out_features, : weight.in_features]


def _round_activations(x: Tensor, act_bits: int) -> Tensor:
    """What the kernels see of x: bfloat16, or int8 with a scale for each token and group."""
    if act_bits == 16:
        return x.bfloat16().to(x.dtype)
    columns = x.shape[-1]
    groups = F.pad(x.float(), (0, -columns % GROUP)).unflatten(-1, (-1, GROUP))
    top = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(top > 0, 127.0 / top, 0.0)).round().clamp(-127.0, 127.0)
    return (codes * (top / 127.0)).flatten(-2)[..., :columns]
