"""An independent InternLM2 forward in plain float64 linear algebra, one sequence at a time."""

import torch


def _norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _turn(x, base):
    """Rotate [T, heads, D] by complex multiplication: (x_i, x_{i + D/2}) is one complex number."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def logits(weights, config, ids, base=None):
    """ids [T] -> logits [T, V] float64; `weights` maps official names to tensors."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    base = config.rope_base if base is None else base
    heads, groups, dim = config.heads, config.kv_heads, config.head_dim
    per_group = heads // groups
    x = w["model.tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.float64).triu(1)
    for i in range(config.layers):
        p = f"model.layers.{i}."
        h = _norm(x, w[p + "attention_norm.weight"], config.norm_eps)
        rows = w[p + "attention.wqkv.weight"].split(dim)  # one chunk of D rows a head, group by group
        out = []
        for g in range(groups):
            first = g * (per_group + 2)
            key = _turn((h @ rows[first + per_group].T)[:, None], base)[:, 0]
            value = h @ rows[first + per_group + 1].T
            for slot in range(per_group):
                query = _turn((h @ rows[first + slot].T)[:, None], base)[:, 0]
                out.append(torch.softmax(query @ key.T / dim**0.5 + mask, -1) @ value)
        x = x + torch.cat(out, -1) @ w[p + "attention.wo.weight"].T
        h = _norm(x, w[p + "ffn_norm.weight"], config.norm_eps)
        gate = h @ w[p + "feed_forward.w1.weight"].T
        x = (
            x
            + (gate * torch.sigmoid(gate) * (h @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
        )
    x = _norm(x, w["model.norm.weight"], config.norm_eps)
    return x @ w.get("output.weight", w["model.tok_embeddings.weight"]).T
