"""Log-probabilities of given continuations, with contexts shared: many choices after one question cost one question,
and many questions after the same examples cost these examples once.

n trunks, m continuations, T tokens of all of them, C hidden size, G kv heads, R queries per kv head, H = G * R heads,
D head dim, V vocabulary. Logits are made for the tokens of continuations alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from internlm2.evaluate.batching import batches
from internlm2.evaluate.families import Family, families, passes
from internlm2.model.transformer import CausalLM, Layer
from internlm2.ops import rope_attention
from internlm2.ops.reference import rotate, table_rows


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
    def tokens_after(self) -> int:
        return sum(len(ids) for ids in self.continuations)

    @property
    def tokens(self) -> int:
        return len(self.context) + self.tokens_after


@torch.no_grad()
def score(model: CausalLM, groups: Sequence[Group], *, batch_tokens: int = 8192) -> list[list[Scored]]:
    """For each group the scores of its continuations, in their order. What contexts begin with alike is read once."""
    for number, group in enumerate(groups):
        if not group.context or not group.continuations or not all(group.continuations):
            raise ValueError(f"group {number}: the context and every continuation need at least one token.")
    found: list[list[Scored]] = [[] for _ in groups]
    # Under dynamic NTK a long sequence's length decides its rotation, so that it shares nothing.
    alone = [number for number, group in enumerate(groups) if _stretched(model, group)]
    others = [number for number, group in enumerate(groups) if not _stretched(model, group)]
    related: list[Family] = []
    for one in families([groups[number].context for number in others], [groups[n].tokens_after for n in others]):
        members = [others[member] for member in one.members]
        # With one continuation and no relatives nothing is shared: the packed kernel alone is faster.
        if len(members) == 1 and len(groups[members[0]].continuations) == 1:
            alone += members
        else:
            related.append(Family(one.trunk, members))
    tokens = [group.tokens for group in groups]
    for chosen in batches([tokens[number] for number in alone], batch_tokens):
        part = [alone[index] for index in chosen]
        for number, scored in zip(part, _score_apart(model, [groups[number] for number in part]), strict=True):
            found[number] = scored
    for batch in passes(related, tokens, batch_tokens):
        numbers = [number for one in batch for number in one.members]
        for number, scored in zip(numbers, _score_shared(model, batch, groups), strict=True):
            found[number] = scored
    return found


def _stretched(model: CausalLM, group: Group) -> bool:
    longest = len(group.context) + max(len(ids) for ids in group.continuations)
    return model.model.rope.length_matters and longest > model.config.max_position_embeddings


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


def _score_shared(model: CausalLM, related: Sequence[Family], groups: Sequence[Group]) -> list[list[Scored]]:
    """All groups of each family after one trunk. The trunks run packed through the attention kernel; the tokens after
    them attend to their trunk's keys and to those before them in their own context and continuation.
    """
    device = model.output_weight.device
    layout = _layout(model, related, groups, device)
    x = model.model.tok_embeddings(layout.ids)
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        x = x + layer.attention.wo(_attend(layer, layer.attention_norm(x), layout))
        x = x + layer.feed_forward(layer.ffn_norm(x))
    hidden = model.model.norm(x)
    return _gather(model, hidden[layout.places], [groups[number] for one in related for number in one.members])


@dataclass(frozen=True)
class _Branch:
    """One group's tokens after its trunk: the rest of its context, then its continuations."""

    family: int
    tokens: int
    mask: Tensor  # [t, trunk + t] bool: what each sees


@dataclass(frozen=True)
class _Layout:
    """Where everything lies: all trunks first, then the branches."""

    ids: Tensor
    trunks: list[int]
    bounds: Tensor  # [n + 1] int32, of the trunks
    cos: Tensor
    sin: Tensor
    positions: Tensor  # of the branches' tokens
    branches: list[_Branch]
    places: Tensor  # where each scored token is predicted
    backend: str


def _layout(model: CausalLM, related: Sequence[Family], groups: Sequence[Group], device: torch.device) -> _Layout:
    trunks = [one.trunk for one in related]
    bounds = torch.tensor([0, *trunks]).cumsum(0)
    ids = [token for one in related for token in groups[one.members[0]].context[: one.trunk]]
    positions: list[int] = []
    places: list[int] = []
    branches: list[_Branch] = []
    for number, one in enumerate(related):
        for member in one.members:
            group, start = groups[member], len(ids)
            rest = group.context[one.trunk :]
            tails = [continuation[:-1] for continuation in group.continuations]  # the last token is never read
            ids += [*rest, *(token for tail in tails for token in tail)]
            end = len(group.context)
            positions += [*range(one.trunk, end), *(end + at for tail in tails for at in range(len(tail)))]
            last = start + len(rest) - 1 if rest else int(bounds[number + 1]) - 1
            at = start + len(rest)
            for tail in tails:
                places += [last, *range(at, at + len(tail))]
                at += len(tail)
            branches.append(_Branch(number, at - start, _mask(one.trunk, len(rest), list(map(len, tails))).to(device)))
    cos, sin = model.model.rope.table(max((*trunks, *(position + 1 for position in positions))), device)
    return _Layout(
        torch.tensor(ids, device=device),
        trunks,
        bounds.to(device, torch.int32),
        cos,
        sin,
        torch.tensor(positions, dtype=torch.int64, device=device),
        branches,
        torch.tensor(places, device=device),
        model.model.backend,
    )


def _mask(trunk: int, rest: int, tails: Sequence[int]) -> Tensor:
    """[t, trunk + t] bool: the rest of a context is causal; a continuation sees all of it, and itself causally."""
    owner = torch.tensor([0] * rest + [number for number, length in enumerate(tails, 1) for _ in range(length)])
    own = ((owner[:, None] == owner[None]) | (owner[None] == 0)).tril()
    return torch.cat((torch.ones(len(owner), trunk, dtype=torch.bool), own), 1)


def _attend(layer: Layer, x: Tensor, layout: _Layout) -> Tensor:
    """Attention of trunks and branches, [T, H * D]."""
    attention = layer.attention
    qkv = attention.wqkv(x).view(len(x), attention.groups, attention.slots, attention.head_dim)
    total = sum(layout.trunks)
    longest = max(layout.trunks)
    out = rope_attention(qkv[:total], layout.cos, layout.sin, layout.bounds, longest, backend=layout.backend)
    if total == len(x):
        return out.flatten(1)
    cos, sin = layout.cos[layout.positions], layout.sin[layout.positions]
    queries = rotate(qkv[total:, :, :-2].flatten(1, 2), cos, sin).to(qkv.dtype)
    own_keys, own_values = rotate(qkv[total:, :, -2], cos, sin).to(qkv.dtype), qkv[total:, :, -1]
    rows = table_rows(layout.bounds, None, total)
    trunk_keys = rotate(qkv[:total, :, -2], layout.cos[rows], layout.sin[rows]).to(qkv.dtype).split(layout.trunks)
    trunk_values = qkv[:total, :, -1].split(layout.trunks)
    parts, at = [out], 0
    for branch in layout.branches:
        here, at = slice(at, at + branch.tokens), at + branch.tokens
        if branch.tokens:
            k = torch.cat((trunk_keys[branch.family], own_keys[here])).transpose(0, 1)[None]  # [1, G, trunk + t, D]
            v = torch.cat((trunk_values[branch.family], own_values[here])).transpose(0, 1)[None]
            q = queries[here].transpose(0, 1)[None]  # [1, H, t, D]
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=branch.mask, enable_gqa=True)
            parts.append(heads[0].transpose(0, 1))
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
