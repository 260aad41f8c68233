"""The compiled operators as torch sees them: schema, shape function and gradient of each, for every device alike.

csrc/cpu/bindings.cpp and csrc/cuda/bindings.cpp implement them under the CPU and CUDA dispatch keys. Call them through
the functions of `internlm2.ops`, which check arguments and fall back on plain PyTorch where nothing is compiled.
"""

from typing import Any

import torch
from torch import Tensor

from internlm2.ops.processor import widens

_LIBRARY = torch.library.Library("internlm2", "DEF")
_TABLE = "Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor? table_offsets, int max_seqlen, float scale"

# qkv [T, G, R + 2, D] -> out [T, G * R, D], lse [G * R, T] float32 (natural log)
_LIBRARY.define(f"rope_attention_forward(Tensor qkv, {_TABLE}) -> (Tensor out, Tensor lse)")
# -> gradient to qkv, contiguous
_LIBRARY.define(f"rope_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {_TABLE}) -> Tensor")

# Tokens [T] of n sequences, each behind `past` [n] tokens of its own in slot `slots` [n] of a cache [S, G, 2, L, D],
# which holds the keys and values of all -> [T, H, D]; CPU only, no gradient
_LIBRARY.define(f"prefill_attention(Tensor qkv, Tensor cache, Tensor slots, Tensor past, {_TABLE}) -> Tensor")

# q [B, H, D], caches [B, G, L, D], lengths [B] -> [B, H, D]; no gradient
_LIBRARY.define("decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float scale) -> Tensor")

# weight [N, K] -> packed uint8 [tiles, groups, 256 * bits], scales bfloat16 [tiles, groups, 16], zeros uint8 likewise
# (empty if symmetric); tiles of 16 outputs, groups of 128 inputs. csrc/common/quantized.h gives the layout.
_LIBRARY.define(
    "quantize_weight(Tensor weight, int bits, bool symmetric) -> (Tensor packed, Tensor scales, Tensor zeros)"
)
_QUANTIZED = "Tensor packed, Tensor scales, Tensor zeros, int bits, int out_features, int in_features"
# -> [N, K] float32 if wide, else bfloat16
_LIBRARY.define(f"dequantize_weight({_QUANTIZED}, bool wide) -> Tensor")
# x [..., K] -> [..., N] in x's dtype; act_bits 16 (bfloat16 activations) or 8 (int8 by token and group)
_LIBRARY.define(f"quantized_linear(Tensor x, {_QUANTIZED}, int act_bits) -> Tensor")

# x [..., K] bfloat16, weight [N, K] bfloat16 -> [..., N]; for few rows, CPU only, no gradient
_LIBRARY.define("few_rows_linear(Tensor x, Tensor weight) -> Tensor")

# Generation on a CPU; no gradient.
# weight [N, K] -> panels [ceil(N / 64), lanes of 32 bits along K, 64 * elements of a lane]
_LIBRARY.define("pack_weight(Tensor weight) -> Tensor")
# x [..., K] -> [..., N]; a row's result does not depend on the others
_LIBRARY.define("packed_linear(Tensor x, Tensor packed, int out_features, int in_features) -> Tensor")
# x [B, C] embeddings -> hidden [B, C]; caches [slots, G, 2, L, D] and lengths [slots] take one more token of each row.
# norms: 2 a layer and the last one; weights: wqkv, wo, gate_up, down of each layer, packed (bits 0) or quantized
_LIBRARY.define(
    "decode_step(Tensor x, Tensor(a!)[] caches, Tensor(b!) lengths, Tensor cos, Tensor sin, Tensor? table_offsets, "
    "Tensor[] norms, Tensor[] weights, Tensor[] scales, int bits, int act_bits, int heads, int intermediate, "
    "float eps) -> Tensor"
)
# logits [B, V], temperatures [B] float32 (0: greedy), uniforms [B] float64 -> tokens [B] and their log-probabilities
_LIBRARY.define(
    "draw_tokens(Tensor logits, Tensor temperatures, Tensor uniforms) -> "
    "(Tensor tokens, Tensor logprobs, Tensor sampling_logprobs)"
)


@torch.library.register_fake("internlm2::rope_attention_forward")
def _rope_attention_forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    table_offsets: Tensor | None,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tokens, groups, slots, dim = qkv.shape
    heads = groups * (slots - 2)
    return qkv.new_empty(tokens, heads, dim), qkv.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.register_fake("internlm2::rope_attention_backward")
def _rope_attention_backward(grad_out: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


@torch.library.register_fake("internlm2::prefill_attention")
def _prefill_attention(qkv: Tensor, *rest: Any) -> Tensor:
    tokens, groups, slots, dim = qkv.shape
    return qkv.new_empty(tokens, groups * (slots - 2), dim)


@torch.library.register_fake("internlm2::decode_attention")
def _decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cos, sin, cu_seqlens, table_offsets, ctx.max_seqlen, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse, cos, sin, cu_seqlens, table_offsets)


def _backward(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    qkv, out, lse, *table = ctx.saved_tensors
    grad_qkv = torch.ops.internlm2.rope_attention_backward(
        grad_out.contiguous(), qkv, out, lse, *table, ctx.max_seqlen, ctx.scale
    )
    return grad_qkv, None, None, None, None, None, None


torch.library.register_autograd("internlm2::rope_attention_forward", _backward, setup_context=_save_for_backward)


@torch.library.register_fake("internlm2::quantize_weight")
def _quantize_weight(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    tiles, groups = -(-weight.shape[0] // 16), -(-weight.shape[1] // 128)
    packed = weight.new_empty(tiles, groups, 256 * bits, dtype=torch.uint8)
    scales = weight.new_empty(tiles, groups, 16, dtype=torch.bfloat16)
    return packed, scales, weight.new_empty((0,) if symmetric else scales.shape, dtype=torch.uint8)


@torch.library.register_fake("internlm2::dequantize_weight")
def _dequantize_weight(
    packed: Tensor, scales: Tensor, zeros: Tensor, bits: int, out_features: int, in_features: int, wide: bool
) -> Tensor:
    return scales.new_empty(out_features, in_features, dtype=torch.float32 if wide else torch.bfloat16)


@torch.library.register_fake("internlm2::quantized_linear")
def _quantized_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    out_features: int,
    in_features: int,
    act_bits: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("internlm2::few_rows_linear")
def _few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("internlm2::pack_weight")
def _pack_weight(weight: Tensor) -> Tensor:
    per_lane = 4 // weight.element_size()
    panels, lanes = -(-weight.shape[0] // 64), -(-weight.shape[1] // per_lane)
    return weight.new_empty(panels, lanes, 64 * per_lane)


@torch.library.register_fake("internlm2::packed_linear")
def _packed_linear(x: Tensor, packed: Tensor, out_features: int, in_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("internlm2::decode_step")
def _decode_step(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("internlm2::draw_tokens")
def _draw_tokens(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide = len(logits), torch.float32
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=wide),
        logits.new_empty(rows, dtype=wide),
    )


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, packed, scales, zeros, *ctx.shape, _act_bits = inputs
    ctx.save_for_backward(packed, scales, zeros)


def _gradient_to_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The weight is frozen, and rounding the activations counts as the identity."""
    wide = grad.float() if widens(grad) else grad
    weight = torch.ops.internlm2.dequantize_weight(*ctx.saved_tensors, *ctx.shape, wide.dtype == torch.float32)
    return ((wide @ weight).to(grad.dtype), *(None,) * 7)


torch.library.register_autograd("internlm2::quantized_linear", _gradient_to_input, setup_context=_save_weight)
