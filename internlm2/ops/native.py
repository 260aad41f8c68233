"""Our own kernels behind the two attention functions, and where they run."""

import torch
from torch import Tensor

import internlm2.ops.schemas  # noqa: F401  defines torch.ops.internlm2.*
from internlm2.ops import extension


def missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where the kernels run on such tensors, else the reason why not."""
    if not extension.loaded(device.type):
        return f"internlm2's kernels for {device.type} are not built"
    if device.type == "cpu":
        if dtype not in (torch.bfloat16, torch.float32):
            return f"internlm2's CPU kernels take bfloat16 and float32, not {dtype}"
        if head_dim % 16 or not 0 < head_dim <= 256:
            return f"internlm2's CPU kernels take head_dim in multiples of 16 up to 256, not {head_dim}"
        return None
    if dtype != torch.bfloat16:
        return f"internlm2's CUDA kernels take bfloat16, not {dtype}"
    if head_dim not in (64, 128):
        return f"internlm2's CUDA kernels take head_dim 64 and 128, not {head_dim}"
    return None


def rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    table_offsets: Tensor | None,
    scale: float,
) -> Tensor:
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    offsets = None if table_offsets is None else table_offsets.contiguous()
    return torch.ops.internlm2.rope_attention_forward(
        qkv, cos.contiguous(), sin.contiguous(), cu_seqlens.contiguous(), offsets, max_seqlen, scale
    )[0]


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    k_cache, v_cache = (cache if cache.stride(-1) == 1 else cache.contiguous() for cache in (k_cache, v_cache))
    return torch.ops.internlm2.decode_attention(q.contiguous(), k_cache, v_cache, lengths.contiguous(), scale)
