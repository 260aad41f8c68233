"""Inputs and float64 references for the CUDA kernels, used on the emulation and on a GPU alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class AttentionCase:
    """Random packed attention. T tokens, G groups, R queries a group, D head dim; `offsets` shift the rotation."""

    lengths: tuple[int, ...]
    groups: int = 2
    queries: int = 2
    dim: int = 64
    offsets: tuple[int, ...] | None = None
    scale: float = 0.1
    slack: int = 0  # how far max_seqlen lies above the longest sequence
    strided: bool = False  # qkv as a slice of a wider tensor
    seed: int = 0
    qkv: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        tokens, slots = sum(self.lengths), self.queries + 2
        wide = torch.randn(tokens, self.groups + self.strided, slots, self.dim, generator=generator).bfloat16()
        self.qkv = wide[:, : self.groups]
        self.grad_out = torch.randn(tokens, self.heads, self.dim, generator=generator).bfloat16()
        self.max_seqlen = max(self.lengths, default=0) + self.slack
        self.cu_seqlens = torch.tensor((0, *self.lengths)).cumsum(0).to(torch.int32)
        self.table_offsets = None if self.offsets is None else torch.tensor(self.offsets, dtype=torch.int32)
        rows = max((o + n for o, n in zip(self.offsets or (0,) * len(self.lengths), self.lengths)), default=1)
        frequency = 1e4 ** (-torch.arange(self.dim // 2, dtype=torch.float64) / (self.dim // 2))
        # Rows up to max_seqlen must exist without offsets: the bindings insist, as they cannot see the lengths.
        angles = torch.arange(max(rows, self.max_seqlen, 1), dtype=torch.float64)[:, None] * frequency
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    @property
    def heads(self) -> int:
        return self.groups * self.queries

    def forward_arguments(self) -> tuple:
        return (self.qkv, self.cos, self.sin, self.cu_seqlens, self.table_offsets, self.max_seqlen, self.scale)

    def reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """out [T, H, D], lse [H, T] and the gradient of qkv under grad_out, all in float64."""
        qkv = self.qkv.double().contiguous().requires_grad_()
        outs, lses = [], []
        start = 0
        for i, length in enumerate(self.lengths):
            rows = torch.arange(length) + (self.offsets[i] if self.offsets else 0)
            out, lse = self._sequence(qkv[start : start + length], self.cos[rows].double(), self.sin[rows].double())
            outs.append(out)
            lses.append(lse)
            start += length
        out, lse = torch.cat(outs), torch.cat(lses, dim=1)
        out.backward(self.grad_out.double())
        assert qkv.grad is not None
        return out.detach(), lse.detach(), qkv.grad

    def _sequence(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def rotate(x: Tensor) -> Tensor:
            low, high = x.chunk(2, dim=-1)
            c, s = cos[:, None], sin[:, None]
            return torch.cat((low * c - high * s, high * c + low * s), dim=-1)

        q = rotate(qkv[:, :, :-2].flatten(1, 2))
        k, v = (x.repeat_interleave(self.queries, dim=1) for x in (rotate(qkv[:, :, -2]), qkv[:, :, -1]))
        scores = torch.einsum("ihd,jhd->hij", q, k) * self.scale
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -math.inf)
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


# Lengths around the block sizes (64 keys, 128 queries), empty sequences, groups of one to six, offsets, strides.
ATTENTION_CASES = {
    "one token": AttentionCase((1,)),
    "short and empty": AttentionCase((5, 0, 64, 1, 0, 17), dim=128, offsets=(3, 0, 100, 7, 2, 0)),
    "block edges": AttentionCase((63, 65, 129), groups=1, queries=1),
    "block edges, wide": AttentionCase((127, 130), groups=1, queries=3, dim=128, slack=70),
    "long": AttentionCase((300, 41), groups=1, queries=1, dim=128, scale=0.2),
    "six queries a group": AttentionCase((70,), groups=2, queries=6),
    "strided, offsets": AttentionCase((33, 96), groups=2, queries=1, strided=True, offsets=(1000, 12)),
}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference; inf for any value that is not finite."""
    if not value.isfinite().all():
        return math.inf
    return ((value.double() - reference).norm() / reference.norm()).item()


@dataclass
class DecodeCase:
    """One query a head over a cache whose unused part is NaN."""

    lengths: tuple[int, ...]
    capacity: int
    groups: int = 2
    queries: int = 2
    dim: int = 64
    position_major: bool = False  # cache stored as [B, L, G, D]
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        batch = len(self.lengths)
        self.q = torch.randn(batch, self.groups * self.queries, self.dim, generator=generator).bfloat16()
        self.lengths_tensor = torch.tensor(self.lengths, dtype=torch.int32)
        self.k, self.v = (
            torch.randn(batch, self.groups, self.capacity, self.dim, generator=generator).bfloat16() for _ in range(2)
        )
        unused = torch.arange(self.capacity) >= self.lengths_tensor[:, None]
        for cache in (self.k, self.v):
            cache.masked_fill_(unused[:, None, :, None], math.nan)
        if self.position_major:
            self.k, self.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (self.k, self.v))

    def arguments(self) -> tuple:
        return self.q, self.k, self.v, self.lengths_tensor, self.dim**-0.5

    def reference(self) -> Tensor:
        rows = []
        for b, length in enumerate(self.lengths):
            k, v = (x[b, :, :length].double().repeat_interleave(self.queries, dim=0) for x in (self.k, self.v))
            scores = torch.einsum("hd,hld->hl", self.q[b].double(), k) * self.dim**-0.5
            rows.append(torch.einsum("hl,hld->hd", scores.softmax(-1), v))  # no keys: an empty sum, zeros
        return torch.stack(rows)


# Lengths around the step of 64 keys, rows without entries, one and several splits, groups beyond 16 queries.
DECODE_CASES = {
    "one key": DecodeCase((1,), capacity=4),
    "ragged, one split": DecodeCase((63, 64, 65, 0, 17), capacity=100, dim=128),
    "ragged, many splits": DecodeCase((1500, 3, 0), capacity=1536, groups=1, queries=4, dim=128),
    "six queries a group": DecodeCase((700,), capacity=900, groups=1, queries=6),
    "twenty queries a group": DecodeCase((130, 70), capacity=130, groups=1, queries=20),
    "position major": DecodeCase((90, 200), capacity=210, position_major=True, dim=128),
}


@dataclass
class LinearCase:
    """y = x W^T with W = (code - zero) * scale in groups of 128 inputs. M rows, N outputs, K inputs."""

    rows: int
    outputs: int
    inputs: int
    bits: int = 4
    asymmetric: bool = False
    wide: bool = False  # float32 in and out
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        tiles, groups, top = -(-self.outputs // 16), -(-self.inputs // 128), 2**self.bits
        self.x = torch.randn(self.rows, self.inputs, generator=generator)
        self.x = self.x if self.wide else self.x.bfloat16()
        # [tiles, groups, output of a tile, input of a group]; padding holds arbitrary codes, which must not matter
        codes = torch.randint(top, (tiles, groups, 16, 128), generator=generator).to(torch.uint8)
        scales = (torch.rand(tiles, groups, 16, generator=generator) * 0.02 + 0.001).bfloat16()
        zeros = torch.randint(top, scales.shape if self.asymmetric else (0,), generator=generator).to(torch.uint8)
        self.weight_arguments = (self._packed(codes), scales, zeros, self.bits, self.outputs, self.inputs)
        shift = zeros.double()[..., None] if self.asymmetric else top // 2
        values = (codes.double() - shift) * scales.double()[..., None]
        self.weight = values.transpose(1, 2).reshape(tiles * 16, groups * 128)[: self.outputs, : self.inputs]

    def _packed(self, codes: Tensor) -> Tensor:
        """The layout of csrc/cuda/params.h, written out byte by byte."""
        tiles, groups = codes.shape[:2]
        inputs_a_block = 32 // self.bits
        packed = torch.zeros(tiles, groups, 128 // inputs_a_block, 16, 4, dtype=torch.uint8)
        for block in range(packed.shape[2]):
            for byte in range(4):
                first = block * inputs_a_block + byte
                value = codes[..., first]
                if self.bits == 4:
                    value = value | codes[..., first + 4] << 4
                packed[:, :, block, :, byte] = value
        return packed.reshape(tiles, groups, 256 * self.bits)

    def arguments(self) -> tuple:
        return (self.x, *self.weight_arguments, 16)

    def reference(self) -> Tensor:
        return self.x.bfloat16().double() @ self.weight.t()


# Rows around the 16 and 64 of a block, outputs around 16, inputs that end inside a step and inside a group.
LINEAR_CASES = {
    "one row": LinearCase(1, 48, 512),
    "ragged outputs and inputs": LinearCase(5, 37, 200, asymmetric=True),
    "sixteen rows, 8 bit": LinearCase(16, 64, 640, bits=8),
    "8 bit, ragged, asymmetric": LinearCase(3, 18, 328, bits=8, asymmetric=True),
    "many rows": LinearCase(70, 80, 384, asymmetric=True),
    "many rows, 8 bit, float32": LinearCase(130, 33, 264, bits=8, wide=True),
    "one group": LinearCase(20, 16, 64),
    "float32, odd outputs": LinearCase(9, 19, 320, asymmetric=True, wide=True),
}
