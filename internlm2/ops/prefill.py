"""Attention of the tokens that a prompt adds to what a cache holds of it already.

T tokens of n sequences, S slots, G kv heads, R queries per kv head, H = G * R heads, D head dim, L cache length.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import internlm2.ops.schemas  # noqa: F401  defines torch.ops.internlm2.*
from internlm2.ops import extension
from internlm2.ops.attention import rope_attention, select_backend
from internlm2.ops.reference import rotate, table_rows

# Queries that the native kernel takes together. A sequence whose earlier tokens are a multiple of it gives the bits
# that it gives when it is computed from its beginning (csrc/cpu/rope_attention_forward.h: ROWS).
BLOCK = 48


def prefill_attention(
    qkv: Tensor,
    cache: Tensor,
    slots: Tensor,
    past: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    table_offsets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of packed tokens, each sequence behind earlier tokens of its own. No gradient.

    qkv            [T, G, R + 2, D], not rotated yet
    cache          [S, G, 2, L, D], rotated keys and values of the earlier tokens and of these
    slots          [n] int64, the slot of each sequence
    past           n numbers of earlier tokens
    cos, sin       [P, D // 2] float32
    cu_seqlens     [n + 1] int32 from 0 to T, of these tokens alone
    max_seqlen     the most tokens of a sequence in qkv
    table_offsets  [n] int32, the table row of each sequence's first token; None means 0 for all

    Returns [T, H, D] in qkv's dtype. Without our CPU kernel, sequences that have earlier tokens are done one by one.
    """
    name = select_backend(qkv.device, qkv.dtype, qkv.shape[-1], backend)
    if name == "native" and extension.native("prefill_attention", qkv.device):
        earlier = torch.tensor(past, dtype=torch.int32)
        scale = qkv.shape[-1] ** -0.5
        return torch.ops.internlm2.prefill_attention(
            qkv, cache, slots, earlier, cos, sin, cu_seqlens, table_offsets, max_seqlen, scale
        )
    if not any(past):
        return rope_attention(qkv, cos, sin, cu_seqlens, max_seqlen, table_offsets=table_offsets, backend=name)
    return one_by_one(qkv, cache, slots, past, cos, sin, cu_seqlens, table_offsets)


def one_by_one(
    qkv: Tensor,
    cache: Tensor,
    slots: Tensor,
    past: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    table_offsets: Tensor | None,
) -> Tensor:
    """The same in plain PyTorch: a masked attention for each sequence."""
    at = table_rows(cu_seqlens, first_rows(past, table_offsets, qkv.device), len(qkv))
    queries = rotate(qkv[:, :, :-2].flatten(1, 2), cos[at], sin[at]).to(qkv.dtype)
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for query, slot, earlier in zip(queries.split(lengths), slots.tolist(), past, strict=True):
        tokens = earlier + len(query)
        keys, values = cache[slot, :, 0, :tokens], cache[slot, :, 1, :tokens]
        seen = torch.ones(len(query), tokens, dtype=torch.bool, device=qkv.device).tril(earlier)
        heads = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys[None], values[None], attn_mask=seen, enable_gqa=True
        )
        outputs.append(heads[0].transpose(0, 1))
    return torch.cat(outputs)


def first_rows(past: Sequence[int], table_offsets: Tensor | None, device: torch.device) -> Tensor:
    """The table row of each sequence's first token here, [n] int32."""
    earlier = torch.tensor(past, dtype=torch.int32, device=device)
    return earlier if table_offsets is None else earlier + table_offsets
