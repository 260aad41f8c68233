"""Attention with RoPE over packed sequences, and attention over a KV cache: one function each, many backends.

T tokens of all sequences, G kv heads, R queries per kv head, H = G * R heads, D head dim, P rows of the cos/sin table.
The caller makes the table in float64, so linear scaling, a changed base and dynamic NTK need no kernel of their own.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from internlm2.ops import backends, native, reference
from internlm2.ops.extension import instruction_set

BACKENDS = ("auto", "native", "flash_attn", "torch_varlen", "sdpa", "reference")


def rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    table_offsets: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention inside each packed sequence, with RoPE applied to queries and keys on the way in.

    qkv            [T, G, R + 2, D]: in each group R queries, then the key, then the value (InternLM2's wqkv output)
    cos, sin       [P, D // 2] float32, half-rotation convention: pairs (i, i + D/2)
    cu_seqlens     [n + 1] int32 from 0 to T; empty sequences are allowed
    max_seqlen     the longest sequence, or any bound on it
    table_offsets  [n] int32, the table row of each sequence's first token; None means 0 for all
    scale          of the scores; D ** -0.5 by default

    Returns [T, H, D] in qkv's dtype; head = group * R + slot. Gradient flows to qkv. ValueError names what does not
    fit; lengths and offsets on a GPU are trusted, since reading them would stall the stream.
    """
    _check_rope_attention(qkv, cos, sin, cu_seqlens, max_seqlen, table_offsets)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    name = select_backend(qkv.device, qkv.dtype, qkv.shape[-1], backend)
    return _ROPE_ATTENTION[name](qkv, cos, sin, cu_seqlens, max_seqlen, table_offsets, scale)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one new token a row over its cache. No gradient.

    q        [B, H, D], rotated already
    caches   [B, G, L, D] with rotated keys; any strides as long as D is contiguous
    lengths  [B] int32, valid entries of each row

    Returns [B, H, D] in q's dtype; a row of length 0 gives zeros. Cache entries past a row's length are never used, but
    sdpa needs them finite (torch multiplies them by 0), so allocate caches with zeros. As backends, flash_attn and
    torch_varlen stand for "the best on this device" here: neither takes this cache layout.
    """
    _check_decode_attention(q, k_cache, v_cache, lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend in ("flash_attn", "torch_varlen"):
        backend = "auto"
    name = select_backend(q.device, q.dtype, q.shape[-1], backend)
    return _DECODE_ATTENTION.get(name, backends.sdpa_decode_attention)(q, k_cache, v_cache, lengths, scale)


def select_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int, requested: str = "auto") -> str:
    """What `rope_attention` runs such tensors on. ValueError where the requested one cannot run, and why."""
    device = torch.device(device)
    if requested not in BACKENDS:
        raise ValueError(f"attention backend {requested!r} does not exist: use one of {', '.join(BACKENDS)}.")
    if requested != "auto":
        reason = _missing(requested, device, dtype, head_dim)
        if reason is not None:
            raise ValueError(f"attention backend {requested!r} cannot run here: {reason}. 'auto' picks one that can.")
        return requested
    # On a GPU the native kernel stays opt-in until it has been measured faster than flash-attn.
    order: tuple[str, ...] = ("native", "sdpa") if device.type == "cpu" else ("flash_attn", "torch_varlen", "sdpa")
    if dtype == torch.float64:
        order = ("reference",)
    return next(name for name in order if _missing(name, device, dtype, head_dim) is None)


def describe_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int, requested: str = "auto") -> str:
    """One line for the log at start: what attention runs on, and why."""
    name = select_backend(device, dtype, head_dim, requested)
    how = "chosen" if requested == "auto" else "requested"
    kind, place = str(dtype).removeprefix("torch."), torch.device(device).type
    if name == "native" and place == "cpu":
        place += f" {instruction_set()}"
    return f"attention: {name} ({how}; {place}, {kind}, head_dim {head_dim})"


def _missing(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if name == "native":
        return native.missing(device, dtype, head_dim)
    if name == "flash_attn":
        too_wide = "flash-attn takes head_dim up to 256" if head_dim > 256 else None
        return too_wide or backends.flash_attn_missing(device, dtype)
    if name == "torch_varlen":
        return backends.torch_varlen_missing(device, dtype)
    return None


_ROPE_ATTENTION = {
    "native": native.rope_attention,
    "flash_attn": backends.flash_attn_rope_attention,
    "torch_varlen": backends.torch_varlen_rope_attention,
    "sdpa": backends.sdpa_rope_attention,
    "reference": reference.rope_attention,
}
_DECODE_ATTENTION = {
    "native": native.decode_attention,
    "sdpa": backends.sdpa_decode_attention,
    "reference": reference.decode_attention,
}


def _check_rope_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int, table_offsets: Tensor | None
) -> None:
    if qkv.dim() != 4 or qkv.shape[2] < 3 or qkv.shape[3] % 2:
        raise ValueError(f"qkv must be [tokens, kv_heads, queries + 2, even head_dim], got {list(qkv.shape)}.")
    if qkv.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"qkv must be a floating point tensor, got {qkv.dtype}.")
    tokens, half = qkv.shape[0], qkv.shape[3] // 2
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != half or table.dtype != torch.float32 or table.shape != cos.shape:
            raise ValueError(
                f"{name} must be float32 [positions, {half}] like cos for head_dim {2 * half}, "
                f"got {table.dtype} {list(table.shape)}."
            )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be int32 [sequences + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}.")
    if table_offsets is not None and (
        table_offsets.dtype != torch.int32 or table_offsets.shape != (len(cu_seqlens) - 1,)
    ):
        raise ValueError(
            f"table_offsets must be int32 [{len(cu_seqlens) - 1}], one a sequence, "
            f"got {table_offsets.dtype} {list(table_offsets.shape)}."
        )
    tensors = (cos, sin, cu_seqlens) if table_offsets is None else (cos, sin, cu_seqlens, table_offsets)
    if any(tensor.device != qkv.device for tensor in tensors):
        raise ValueError(f"qkv, cos, sin, cu_seqlens and table_offsets must share one device, qkv is on {qkv.device}.")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = None if table_offsets is None else table_offsets.tolist()
        _check_lengths(cu_seqlens.tolist(), offsets, max_seqlen, tokens, rows=len(cos))


def _check_lengths(bounds: list[int], offsets: list[int] | None, max_seqlen: int, tokens: int, rows: int) -> None:
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of qkv, got {_abridged(bounds)}.")
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but the longest sequence of cu_seqlens has {longest} tokens.")
    starts = offsets or [0] * len(lengths)
    if min(starts, default=0) < 0:
        raise ValueError(f"table_offsets must not be negative, got {_abridged(starts)}.")
    needed = max((start + length for start, length in zip(starts, lengths) if length), default=0)
    if needed > rows:
        raise ValueError(f"the cos/sin table has {rows} rows, but these sequences need {needed}: build a longer table.")


def _abridged(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{values[:4]} ... {values[-3:]}"


def _check_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            "decode_attention takes q [batch, heads, head_dim] and equal caches [batch, kv_heads, length, head_dim], "
            f"got {list(q.shape)}, {list(k_cache.shape)}, {list(v_cache.shape)}."
        )
    batch, heads, dim = q.shape
    if k_cache.shape[0] != batch or k_cache.shape[3] != dim or k_cache.shape[1] == 0 or heads % k_cache.shape[1]:
        raise ValueError(
            f"q {list(q.shape)} does not fit the cache {list(k_cache.shape)}: batch and head_dim must be equal "
            "and the kv heads must divide the heads."
        )
    if not (q.dtype == k_cache.dtype == v_cache.dtype) or not q.dtype.is_floating_point:
        raise ValueError(
            f"q and both caches must share one floating dtype, got {q.dtype}, {k_cache.dtype}, {v_cache.dtype}."
        )
    if lengths.dtype != torch.int32 or lengths.shape != (batch,):
        raise ValueError(f"lengths must be int32 [{batch}], got {lengths.dtype} {list(lengths.shape)}.")
    if any(tensor.device != q.device for tensor in (k_cache, v_cache, lengths)):
        raise ValueError(f"q, caches and lengths must share one device, q is on {q.device}.")
    if lengths.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(lengths))
        if low < 0 or high > k_cache.shape[2]:
            raise ValueError(f"lengths must lie in 0..{k_cache.shape[2]}, the cache's capacity, got {low}..{high}.")
