"""Attention with RoPE, attention over a KV cache, linear layers, quantised weights: each with a plain PyTorch twin."""

from internlm2.ops.attention import decode_attention, describe_backend, rope_attention, select_backend
from internlm2.ops.decoder import Decoder, DecoderLayer, Projection
from internlm2.ops.linear import Linear
from internlm2.ops.packed import PackedWeight, pack_weight, packed_linear
from internlm2.ops.prefill import BLOCK as PREFILL_BLOCK
from internlm2.ops.prefill import first_rows, prefill_attention
from internlm2.ops.quantize import QuantizedLinear, describe_quantize, quantize_linears_, quantized_copy, refresh_
from internlm2.ops.quantized import QuantizedWeight, dequantize_weight, quantize_weight, quantized_linear

__all__ = [
    "PREFILL_BLOCK",
    "Decoder",
    "DecoderLayer",
    "Linear",
    "PackedWeight",
    "Projection",
    "QuantizedLinear",
    "QuantizedWeight",
    "decode_attention",
    "dequantize_weight",
    "describe_backend",
    "describe_quantize",
    "first_rows",
    "pack_weight",
    "packed_linear",
    "prefill_attention",
    "quantize_linears_",
    "quantize_weight",
    "quantized_copy",
    "quantized_linear",
    "refresh_",
    "rope_attention",
    "select_backend",
]
