"""The names and shapes of a checkpoint: the official InternLM2 layout, and the Llama layout that everything else reads.

The two differ in names and in one tensor: wqkv holds, for each kv head, its R query heads, then its key, then its value
(report 2.2), where Llama has q_proj, k_proj and v_proj. Both rotate halves, so no row inside a head moves.
"""

import re

import torch
from torch import Tensor

from internlm2.config import ModelConfig

EMBEDDING, OUTPUT, REWARD_HEAD = "model.tok_embeddings.weight", "output.weight", "v_head.weight"
QKV = ("q_proj", "k_proj", "v_proj")

_WHOLE = {EMBEDDING: "model.embed_tokens.weight", "model.norm.weight": "model.norm.weight", OUTPUT: "lm_head.weight"}
_PARTS = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def official_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the official layout in the order of the forward pass; no output matrix where it is tied."""
    c, f = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, c)}
    for i in range(config.layers):
        p = f"model.layers.{i}."
        shapes[p + "attention_norm.weight"] = (c,)
        shapes[p + "attention.wqkv.weight"] = ((config.heads + 2 * config.kv_heads) * config.head_dim, c)
        shapes[p + "attention.wo.weight"] = (c, config.heads * config.head_dim)
        shapes[p + "ffn_norm.weight"] = (c,)
        shapes[p + "feed_forward.w1.weight"] = (f, c)
        shapes[p + "feed_forward.w3.weight"] = (f, c)
        shapes[p + "feed_forward.w2.weight"] = (c, f)
    shapes["model.norm.weight"] = (c,)
    if not config.tie_embeddings:
        shapes[OUTPUT] = (config.vocab_size, c)
    return shapes


def reward_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a reward model: the backbone, and a head of one output instead of the output matrix."""
    shapes = {name: shape for name, shape in official_shapes(config).items() if name != OUTPUT}
    return {**shapes, REWARD_HEAD: (1, config.hidden_size)}


def llama_shapes(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    """The Llama tensors that hold the official tensor `name`, with their shapes: three for wqkv, else one."""
    if name in _WHOLE:
        shape = (config.hidden_size,) if name == "model.norm.weight" else (config.vocab_size, config.hidden_size)
        return {_WHOLE[name]: shape}
    found = _LAYER.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} has no place in the Llama layout.")
    layer, part = f"model.layers.{found[1]}.", found[2]
    if part == "attention.wqkv":
        rows = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
        return {f"{layer}self_attn.{qkv}.weight": (n, config.hidden_size) for qkv, n in zip(QKV, rows)}
    return {f"{layer}{_PARTS[part]}.weight": official_shapes(config)[name]}


def split_wqkv(wqkv: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """wqkv [(H + 2 G) * D, C] -> q [H * D, C], k and v [G * D, C]."""
    groups, r, d = config.kv_heads, config.q_per_kv, config.head_dim
    grouped = wqkv.reshape(groups, r + 2, d, -1)
    q, k, v = grouped[:, :r], grouped[:, r], grouped[:, r + 1]
    return q.reshape(groups * r * d, -1), k.reshape(groups * d, -1), v.reshape(groups * d, -1)


def fuse_wqkv(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of `split_wqkv`."""
    groups, r, d = config.kv_heads, config.q_per_kv, config.head_dim
    parts = (q.reshape(groups, r, d, -1), k.reshape(groups, 1, d, -1), v.reshape(groups, 1, d, -1))
    return torch.cat(parts, dim=1).reshape((groups * (r + 2)) * d, -1)
