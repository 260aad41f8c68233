"""Inputs shared by the attention tests: packed qkv with a table in float64 precision, and an oracle by exact loops."""

import math

import torch
from torch import Tensor


def table(rows: int, dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * base ** (-torch.arange(0, dim, 2).double() / dim)
    return angles.cos().float(), angles.sin().float()


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def packed(lengths: list[int], groups: int, queries: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), groups, queries + 2, dim, generator=draw, dtype=torch.float64).to(dtype)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


def complex_oracle(
    qkv: Tensor, lengths: list[int], offsets: list[int] | None, base: float, scale: float | None = None
) -> Tensor:
    """float64 from the definition, sharing no code with the package: RoPE as a complex product, softmax row by row."""
    x = qkv.double()
    groups, slots, dim = x.shape[1:]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    rows, start = [], 0
    frequencies = base ** (-torch.arange(0, dim, 2).double() / dim)
    for index, length in enumerate(lengths):
        first = offsets[index] if offsets else 0
        part = x[start : start + length]
        angle = (first + torch.arange(length, dtype=torch.float64))[:, None] * frequencies
        spin = torch.polar(torch.ones_like(angle), angle)[:, None, None]
        turned = torch.complex(part[..., : dim // 2], part[..., dim // 2 :]) * spin
        rotated = torch.cat((turned.real, turned.imag), dim=-1)
        for i in range(length):
            weights = (rotated[i, :, :-2] @ rotated[: i + 1, :, -2].permute(1, 2, 0) * scale).softmax(-1)
            rows.append((weights @ part[: i + 1, :, -1].transpose(0, 1)).reshape(groups * (slots - 2), dim))
        start += length
    return torch.stack(rows) if rows else x.new_zeros(0, groups * (slots - 2), dim)
