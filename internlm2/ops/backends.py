"""The rivals of our own kernels behind the same two functions: torch SDPA, torch's varlen_attn and flash-attn.

Each takes validated arguments (see `internlm2.ops.attention`), rotates in float32, and never builds a T x T tensor.
A probe returns None where the backend works, else the reason why not.
"""

import functools
import importlib.util
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm2.ops.reference import rotate, split_qkv, table_rows


def _rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = split_qkv(qkv)
    rows = table_rows(cu_seqlens, offsets, qkv.shape[0])
    cos, sin = cos[rows], sin[rows]
    return rotate(query, cos, sin).to(qkv.dtype), rotate(key, cos, sin).to(qkv.dtype), value


def sdpa_rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    table_offsets: Tensor | None,
    scale: float,
) -> Tensor:
    """One F.scaled_dot_product_attention a sequence: a dense mask over the packed row would cost T x T."""
    query, key, value = _rotated(qkv, cos, sin, cu_seqlens, table_offsets)
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
        if len(q) == 0:
            continue
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else query


def sdpa_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    valid = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]
    out = F.scaled_dot_product_attention(
        q[:, :, None], k_cache, v_cache, attn_mask=valid[:, None, None], scale=scale, enable_gqa=True
    )[:, :, 0]
    return out.masked_fill((lengths == 0)[:, None, None], 0.0)


@functools.cache
def flash_attn_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "flash-attn runs on CUDA only"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16 and float16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash-attn needs an Ampere GPU or newer"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install flash-attn"
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:  # built for another torch: the usual way in which it is broken
        return f"flash-attn does not import: {error}"
    return None


def flash_attn_rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    table_offsets: Tensor | None,
    scale: float,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    query, key, value = _rotated(qkv, cos, sin, cu_seqlens, table_offsets)
    return flash_attn_varlen_func(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=True
    )


@functools.cache
def torch_varlen_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "torch's varlen_attn runs on CUDA only"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"torch's varlen_attn takes bfloat16 and float16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "torch's varlen_attn needs an Ampere GPU or newer"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    # Early versions had is_causal and no grouped queries; the window form is the one that stayed.
    if not {"enable_gqa", "window_size", "scale"} <= set(inspect.signature(varlen_attn).parameters):
        return f"varlen_attn of torch {torch.__version__} lacks enable_gqa, window_size or scale"
    return None


def torch_varlen_rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    table_offsets: Tensor | None,
    scale: float,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = _rotated(qkv, cos, sin, cu_seqlens, table_offsets)
    out = varlen_attn(
        query,
        key,
        value.contiguous(),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
    return out
