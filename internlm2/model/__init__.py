"""The network, its loss and sampling, and weights in and out."""

from internlm2.model.cache import KVCache
from internlm2.model.generate import generate, stream
from internlm2.model.initialization import initial_values, initialize
from internlm2.model.loss import cross_entropy_sum, token_cross_entropy
from internlm2.model.transformer import CausalLM, InternLM2

__all__ = [
    "CausalLM",
    "InternLM2",
    "KVCache",
    "cross_entropy_sum",
    "generate",
    "initial_values",
    "initialize",
    "stream",
    "token_cross_entropy",
]
