"""Operators with a plain PyTorch twin each: attention with RoPE, attention over a KV cache, linear layers."""

from internlm2.ops.attention import decode_attention, describe_backend, rope_attention, select_backend
from internlm2.ops.linear import Linear

__all__ = ["Linear", "decode_attention", "describe_backend", "rope_attention", "select_backend"]
