"""Log-probabilities of given continuations, with contexts shared: many choices after one question cost one question.

n contexts, m continuations, T tokens of all of them, C hidden size, G kv heads, R queries per kv head, H = G * R heads,
D head dim, V vocabulary. Logits are made for the tokens of continuations alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm2.evaluate.batching import batches
from internlm2.model.transformer import CausalLM, Layer
from internlm2.ops import rope_attention
from internlm2.ops.reference import rotate


@dataclass
class Scored:
    """Of one continuation: `logprobs` of its tokens (natural), and `greedy`: is each the most likely token there?"""

    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class Group:
    """One context (at least one token) and the continuations that are scored after it (at least one token each)."""

    context: list[int]
    continuations: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(len(ids) for ids in self.continuations)


@torch.no_grad()
def score(model: CausalLM, groups: Sequence[Group], *, batch_tokens: int = 8192) -> list[list[Scored]]:
    """For each group the scores of its continuations, in their order."""
    for number, group in enumerate(groups):
        if not group.context or not group.continuations or not all(group.continuations):
            raise ValueError(f"group {number}: the context and every continuation need at least one token.")
    found: list[list[Scored]] = [[] for _ in groups]
    for chosen in batches([group.tokens for group in groups], batch_tokens):
        part = [groups[index] for index in chosen]
        shared = [group for group in part if _shares(model, group)]
        apart = [group for group in part if not _shares(model, group)]
        scores = {id(group): scored for group, scored in zip(shared, _score_shared(model, shared))}
        scores |= {id(group): scored for group, scored in zip(apart, _score_apart(model, apart))}
        for index in chosen:
            found[index] = scores[id(groups[index])]
    return found


def _shares(model: CausalLM, group: Group) -> bool:
    """Is a shared context worth it, and right? Under dynamic NTK a long sequence's length decides its rotation."""
    longest = len(group.context) + max(len(ids) for ids in group.continuations)
    stretched = model.model.rope.length_matters and longest > model.config.max_position_embeddings
    return len(group.continuations) > 1 and not stretched


def _score_apart(model: CausalLM, groups: Sequence[Group]) -> list[list[Scored]]:
    """Each continuation after a copy of its context, packed."""
    rows = [(group.context, ids) for group in groups for ids in group.continuations]
    if not rows:
        return []
    device = model.output_weight.device
    bounds = torch.tensor([0, *(len(context) + len(ids) - 1 for context, ids in rows)]).cumsum(0)
    ids = torch.tensor([token for context, ids in rows for token in (*context, *ids[:-1])], device=device)
    hidden = model.model(ids, bounds.to(device, torch.int32))
    places = [
        int(start) + len(context) - 1 + offset
        for start, (context, ids) in zip(bounds[:-1], rows)
        for offset in range(len(ids))
    ]
    return _gather(model, hidden[torch.tensor(places, device=device)], groups)


def _score_shared(model: CausalLM, groups: Sequence[Group]) -> list[list[Scored]]:
    """All continuations of a group after one context. The contexts run packed through the attention kernel; the few
    tokens of the continuations attend to their context's keys and, causally, to their own.
    """
    if not groups:
        return []
    device = model.output_weight.device
    contexts = [len(group.context) for group in groups]
    tails = [[ids[:-1] for ids in group.continuations] for group in groups]  # the last token is never read
    lengths = [sum(len(ids) for ids in tail) for tail in tails]
    ids = torch.tensor(
        [*(t for group in groups for t in group.context), *(t for tail in tails for part in tail for t in part)],
        device=device,
    )
    layout = _layout(model, contexts, tails, device)
    x = model.model.tok_embeddings(ids)
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        x = x + layer.attention.wo(_attend(layer, layer.attention_norm(x), layout, contexts, lengths))
        x = x + layer.feed_forward(layer.ffn_norm(x))
    hidden = model.model.norm(x)
    return _gather(model, hidden[layout.places], groups)


@dataclass(frozen=True)
class _Layout:
    """Where everything lies: contexts first, then the continuations of all groups."""

    bounds: Tensor  # [n + 1] int32, of the contexts
    longest: int
    cos: Tensor
    sin: Tensor
    positions: Tensor  # of the continuations' tokens
    masks: list[Tensor]  # [t, context + t] of each group
    places: Tensor  # where each scored token is predicted
    backend: str


def _layout(
    model: CausalLM, contexts: Sequence[int], tails: Sequence[Sequence[Sequence[int]]], device: torch.device
) -> _Layout:
    bounds = torch.tensor([0, *contexts]).cumsum(0)
    masks: list[Tensor] = []
    positions: list[int] = []
    places: list[int] = []
    at = int(bounds[-1])
    for end, context, tail in zip(bounds[1:].tolist(), contexts, tails):
        owner = torch.tensor([number for number, part in enumerate(tail) for _ in part], dtype=torch.int64)
        own = (owner[:, None] == owner[None]).tril() if len(owner) else torch.zeros(0, 0, dtype=torch.bool)
        masks.append(torch.cat((torch.ones(len(owner), context, dtype=torch.bool), own), 1).to(device))
        for part in tail:
            positions += range(context, context + len(part))
            places += [end - 1, *range(at, at + len(part))]
            at += len(part)
    longest = max((position + 1 for position in positions), default=1)
    cos, sin = model.model.rope.table(max(longest, *contexts), device)
    return _Layout(
        bounds.to(device, torch.int32),
        max(contexts),
        cos,
        sin,
        torch.tensor(positions, dtype=torch.int64, device=device),
        masks,
        torch.tensor(places, device=device),
        model.model.backend,
    )


def _attend(layer: Layer, x: Tensor, layout: _Layout, contexts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Attention of contexts and continuations, [T, H * D]."""
    attention = layer.attention
    qkv = attention.wqkv(x).view(len(x), attention.groups, attention.slots, attention.head_dim)
    total = sum(contexts)
    out = rope_attention(qkv[:total], layout.cos, layout.sin, layout.bounds, layout.longest, backend=layout.backend)
    if total == len(x):
        return out.flatten(1)
    cos, sin = layout.cos[layout.positions], layout.sin[layout.positions]
    queries = rotate(qkv[total:, :, :-2].flatten(1, 2), cos, sin).to(qkv.dtype)
    own_keys, own_values = rotate(qkv[total:, :, -2], cos, sin).to(qkv.dtype), qkv[total:, :, -1]
    parts = [out]
    start, at = 0, 0
    for context, length, mask in zip(contexts, lengths, layout.masks):
        keys = rotate(qkv[start : start + context, :, -2], layout.cos[:context], layout.sin[:context]).to(qkv.dtype)
        here = slice(at, at + length)
        k = torch.cat((keys, own_keys[here])).transpose(0, 1)[None]  # [1, G, context + t, D]
        v = torch.cat((qkv[start : start + context, :, -1], own_values[here])).transpose(0, 1)[None]
        q = queries[here].transpose(0, 1)[None]  # [1, H, t, D]
        if length:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            parts.append(heads[0].transpose(0, 1))
        start, at = start + context, at + length
    return torch.cat(parts).flatten(1)


def _gather(model: CausalLM, hidden: Tensor, groups: Sequence[Group]) -> list[list[Scored]]:
    """hidden [t, C] before each scored token, in the order of groups and continuations -> scores."""
    targets = torch.tensor(
        [token for group in groups for ids in group.continuations for token in ids], device=hidden.device
    )
    logprobs: list[float] = []
    best: list[bool] = []
    chunk = max(64, (1 << 22) // model.config.vocab_size)  # logits in memory at once: 16 MiB of float32
    for part, wanted in zip(hidden.split(chunk), targets.split(chunk)):
        logits = model.head(part).float()
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        logprobs += (chosen - logits.logsumexp(-1)).tolist()
        best += (logits.argmax(-1) == wanted).tolist()
    scores: list[list[Scored]] = []
    at = 0
    for group in groups:
        scores.append([])
        for ids in group.continuations:
            here = slice(at, at + len(ids))
            scores[-1].append(Scored(logprobs[here], all(best[here])))
            at += len(ids)
    return scores
