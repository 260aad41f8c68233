"""The network, its loss, and weights in and out."""

from internlm2.model.initialization import initial_values, initialize
from internlm2.model.loss import cross_entropy_sum, token_cross_entropy
from internlm2.model.transformer import CausalLM, InternLM2

__all__ = [
    "CausalLM",
    "InternLM2",
    "cross_entropy_sum",
    "initial_values",
    "initialize",
    "token_cross_entropy",
]
