"""The attention operators in plain PyTorch: what every kernel is measured against, and the path for float64.

T tokens of all sequences, G kv heads, R queries per kv head, H = G * R heads, D head dim, L cache length.
"""

import torch
from torch import Tensor


def split_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """InternLM2's grouped projection [T, G, R + 2, D] as queries [T, H, D], keys and values [T, G, D]."""
    return qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]


def table_rows(cu_seqlens: Tensor, table_offsets: Tensor | None, tokens: int) -> Tensor:
    """Row of the cos/sin table for each token, [T] int64: position in its sequence plus that sequence's offset."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    shift = starts if table_offsets is None else starts - table_offsets
    return torch.arange(tokens, device=cu_seqlens.device) - shift.repeat_interleave(lengths, output_size=tokens)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-rotation RoPE of x [T, heads, D] by cos, sin [T, D // 2]: the pair (i, i + D/2) turns by one angle.

    float32 inside, whatever comes in (float64 stays float64): rounding cos and sin to bfloat16, as the eager HF code
    does, costs a third more error in the gradients.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    table_offsets: Tensor | None,
    scale: float,
) -> Tensor:
    """Twin of `internlm2.ops.rope_attention`: one dense softmax a sequence, float32 inside (float64 for float64)."""
    query, key, value = split_qkv(qkv)
    heads_per_group = query.shape[1] // key.shape[1]
    rows = table_rows(cu_seqlens, table_offsets, qkv.shape[0])
    query, key = rotate(query, cos[rows], sin[rows]), rotate(key, cos[rows], sin[rows])
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.to(query.dtype).split(lengths)):
        k, v = (x.repeat_interleave(heads_per_group, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        future = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        probabilities = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hij,jhd->ihd", probabilities, v))
    return torch.cat(outputs).to(qkv.dtype) if outputs else query.to(qkv.dtype)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Twin of `internlm2.ops.decode_attention`, float32 inside (float64 for float64). A row of length 0 gives zeros."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, dim = q.shape
    groups, capacity = k_cache.shape[1:3]
    grouped = q.to(wide).view(batch, groups, heads // groups, dim)
    scores = torch.einsum("bgrd,bgld->bgrl", grouped, k_cache.to(wide)) * scale
    valid = (torch.arange(capacity, device=q.device) < lengths[:, None])[:, None, None]
    scores = scores.masked_fill(~valid, float("-inf"))
    probabilities = scores.softmax(dim=-1).masked_fill(~valid, 0.0)
    # Entries past the length are whatever the cache was allocated with, and 0 * NaN is NaN: clear them as well.
    values = v_cache.to(wide).masked_fill(~valid.transpose(-1, -2), 0.0)
    return torch.einsum("bgrl,bgld->bgrd", probabilities, values).reshape(batch, heads, dim).to(q.dtype)
