"""One decoding step through all layers of the network: a single native call on a CPU, plain PyTorch elsewhere.

B rows, C hidden size, G kv heads, R queries per kv head, H = G * R, D head dim, L cache length, F intermediate size.
A step of a small model is over in a millisecond: the two dozen operators that torch would dispatch for each layer, and
the waking of threads for each, cost more than the arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import internlm2.ops.schemas  # noqa: F401  defines torch.ops.internlm2.*
from internlm2.ops import extension
from internlm2.ops.attention import decode_attention
from internlm2.ops.packed import PackedWeight
from internlm2.ops.quantized import QuantizedWeight
from internlm2.ops.reference import rotate

NATIVE_DTYPES = (torch.bfloat16, torch.float32)


class Projection(Protocol):
    """A linear layer x [M, K] -> [M, N]. `weight` is what the native step reads, None where it cannot."""

    @property
    def weight(self) -> PackedWeight | QuantizedWeight | None: ...

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass
class DecoderLayer:
    """The norms [C], and the four projections; `gate_up` gives w1's outputs, then w3's."""

    attention_norm: Tensor
    wqkv: Projection
    wo: Projection
    ffn_norm: Tensor
    gate_up: Projection
    down: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.wqkv, self.wo, self.gate_up, self.down


class Decoder:
    """The layers and the last norm [C]. Rounds where `internlm2.model` rounds.

    attention  backend of `decode_attention`; all but auto and native keep the step in PyTorch
    act_bits   activations that meet quantized weights: 8 or 16
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        norm: Tensor,
        *,
        heads: int,
        eps: float,
        attention: str = "auto",
        act_bits: int = 8,
    ):
        self.layers, self.norm, self.heads, self.eps = list(layers), norm, heads, eps
        self.attention, self.act_bits = attention, act_bits
        self._native = self._arguments() if attention in ("auto", "native") else None

    @property
    def native(self) -> bool:
        """Does a step run as one native call?"""
        return self._native is not None

    def step(
        self,
        x: Tensor,
        caches: list[Tensor],
        lengths: Tensor,
        cos: Tensor,
        sin: Tensor,
        table_offsets: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """One more token for each of the first B slots.

        x              [B, C] embeddings
        caches         [slots, G, 2, L, D] a layer: rotated keys, then values; each slot gets one more of both
        lengths        [slots] int32 tokens in each slot; the first B grow by one
        cos, sin       [P, D // 2] float32
        table_offsets  [slots] int32, the table row of each slot's first token; None means 0 for all

        Returns the hidden states [B, C] after the last norm.
        """
        if backend != "reference" and self._native is not None:
            norms, weights, scales, bits, intermediate = self._native
            return torch.ops.internlm2.decode_step(
                x, caches, lengths, cos, sin, table_offsets, norms, weights, scales, bits, self.act_bits, self.heads,
                intermediate, self.eps,
            )  # fmt: skip
        if backend == "native":
            raise ValueError("the native decoding step takes packed or quantized weights on a CPU, head_dim in "
                             "multiples of 16 up to 256, and sizes in multiples of 16.")  # fmt: skip
        return self._reference(x, caches, lengths, cos, sin, table_offsets)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm, float32 inside, rounded before the weight as in `internlm2.model.norm`."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = norm.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return (x * rstd).to(x.dtype) * weight

    def feed_forward(self, x: Tensor, layer: DecoderLayer) -> Tensor:
        """x [T, C] -> x + down(silu(gate) * up)."""
        gate, up = layer.gate_up(self.normed(x, layer.ffn_norm)).chunk(2, dim=-1)
        return x + layer.down(F.silu(gate).mul_(up))

    def _reference(
        self,
        x: Tensor,
        caches: list[Tensor],
        lengths: Tensor,
        cos: Tensor,
        sin: Tensor,
        table_offsets: Tensor | None,
    ) -> Tensor:
        rows, (groups, dim) = len(x), (caches[0].shape[1], caches[0].shape[4])
        lengths = lengths[:rows]
        slots, positions = torch.arange(rows, device=x.device), lengths.long()
        at = positions if table_offsets is None else positions + table_offsets[:rows]
        cos, sin = cos[at], sin[at]
        lengths += 1
        for layer, cache in zip(self.layers, caches):
            qkv = layer.wqkv(self.normed(x, layer.attention_norm)).view(rows, groups, -1, dim)
            turned = rotate(qkv[:, :, :-1].flatten(1, 2), cos, sin).to(x.dtype).view(rows, groups, -1, dim)
            cache[slots, :, 0, positions], cache[slots, :, 1, positions] = turned[:, :, -1], qkv[:, :, -1]
            query = turned[:, :, :-1].reshape(rows, -1, dim)
            keys, values = cache[:rows, :, 0], cache[:rows, :, 1]
            out = decode_attention(query, keys, values, lengths, backend=self.attention)
            x = self.feed_forward(x + layer.wo(out.flatten(1)), layer)
        return self.normed(x, self.norm)

    def _arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], int, int] | None:
        """Norms, weights, scales, bits (0: packed) and F for the operator; None where it cannot run these layers."""
        found = [projection.weight for layer in self.layers for projection in layer.projections]
        packed = [weight for weight in found if isinstance(weight, PackedWeight)]
        quantized = [weight for weight in found if isinstance(weight, QuantizedWeight) and weight.symmetric]
        weights: list[PackedWeight] | list[QuantizedWeight] = packed or quantized
        bits = {weight.bits for weight in quantized} or {0}
        if not found or len(weights) != len(found) or len(bits) > 1:
            return None
        if not extension.native("decode_step", self.norm.device) or self.norm.dtype not in NATIVE_DTYPES:
            return None
        hidden, dim = weights[0].in_features, weights[1].in_features // self.heads
        intermediate = weights[2].out_features // 2
        if hidden % 16 or intermediate % 16 or dim % 16 or dim > 256:
            return None
        norms = [norm for layer in self.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        scales = [weight.scales for weight in quantized]
        return [*norms, self.norm], [weight.packed for weight in weights], scales, bits.pop(), intermediate
