"""Attention with RoPE, attention over a KV cache, linear layers, quantised weights: each with a plain PyTorch twin."""

from internlm2.ops.attention import decode_attention, describe_backend, rope_attention, select_backend
from internlm2.ops.linear import Linear
from internlm2.ops.quantized import QuantizedWeight, dequantize_weight, quantize_weight, quantized_linear

__all__ = [
    "Linear",
    "QuantizedWeight",
    "decode_attention",
    "dequantize_weight",
    "describe_backend",
    "quantize_weight",
    "quantized_linear",
    "rope_attention",
    "select_backend",
]
