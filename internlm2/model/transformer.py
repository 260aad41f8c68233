"""InternLM2 (report 2.2): a LLaMA-style decoder with one fused, grouped projection for queries, keys and values.

T tokens of all packed sequences, n sequences, C hidden size, G kv heads, R queries per kv head, H = G * R heads,
D head dim, V vocabulary. Pre-norm, no bias anywhere. Parameter names are those of the released files.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internlm2.config import ConfigError, ModelConfig
from internlm2.model.embedding import Embedding
from internlm2.model.feed_forward import FeedForward
from internlm2.model.initialization import new_model
from internlm2.model.loss import cross_entropy_sum, token_cross_entropy, token_logprobs
from internlm2.model.norm import RMSNorm
from internlm2.model.rope import RopeTables
from internlm2.model.sequence_parallel import SequenceParallel
from internlm2.ops import Linear, rope_attention

IGNORE = -100  # the label of a position without a loss


@dataclass
class Packing:
    """Where the sequences of one packed row lie, and the rotation of each position."""

    cu_seqlens: Tensor  # [n + 1] int32
    max_seqlen: int
    cos: Tensor  # [P, D // 2] float32
    sin: Tensor
    table_offsets: Tensor | None  # [n] int32
    backend: str
    ranks: SequenceParallel | None = None  # that share the row


class Attention(nn.Module):
    """Grouped-query attention. wqkv's rows are, for each kv head, R query heads, then the key, then the value."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.groups, self.slots, self.head_dim = config.kv_heads, config.q_per_kv + 2, config.head_dim
        self.wqkv = Linear(config.hidden_size, self.groups * self.slots * self.head_dim, bias=False)
        self.wo = Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, packing: Packing, at: Tensor | None = None) -> Tensor:
        qkv = self.wqkv(x).view(len(x), self.groups, self.slots, self.head_dim)
        if packing.ranks is not None:
            qkv = packing.ranks.scatter_groups(qkv)
        out = rope_attention(
            qkv,
            packing.cos,
            packing.sin,
            packing.cu_seqlens,
            packing.max_seqlen,
            table_offsets=packing.table_offsets,
            backend=packing.backend,
        )
        if packing.ranks is not None:
            out = packing.ranks.gather_heads(out)
        out = out.flatten(1)
        return self.wo(out if at is None else out.index_select(0, at))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with `at` [A] the result has these rows of x only."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, packing: Packing, at: Tensor | None = None) -> Tensor:
        mixed = self.attention(self.attention_norm(x), packing, at)
        x = (x if at is None else x.index_select(0, at)) + mixed
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2(nn.Module):
    """The backbone: token ids to normalised hidden states. Heads (LM, reward, value) are modules of their own.

    attention  backend of `rope_attention`: auto, native, flash_attn, torch_varlen, sdpa or reference
    recompute  none, or full: keep each layer's input alone and run the layer again in the backward pass

    With `sequence_parallel`, which an engine sets, each rank of that group holds and returns its part of the tokens.
    """

    sequence_parallel: SequenceParallel | None = None

    def __init__(self, config: ModelConfig, *, attention: str = "auto", recompute: str = "none"):
        super().__init__()
        if config.heads % config.kv_heads:
            raise ConfigError(
                f"model.kv_heads={config.kv_heads} must divide model.heads={config.heads}: "
                "each kv head serves equally many query heads."
            )
        if recompute not in ("none", "full"):
            raise ConfigError(f"recompute must be none or full, got {recompute!r}.")
        self.config, self.backend, self.recompute = config, attention, recompute
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rope = RopeTables(config)

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, at: Tensor | None = None
    ) -> Tensor:
        """Packed sequences ids [T] int64, cu_seqlens [n + 1] int32 -> hidden [T, C], after the final norm.

        Positions start at 0 in each sequence and attention stays inside it. `max_seqlen` saves a look at cu_seqlens,
        which on a GPU would stall the stream. With sequence parallelism hidden is this rank's [L, C].

        at  [A] int64: hidden [A, C] of these positions alone. The last layer then skips what follows its attention
            everywhere else, which nobody would read: four fifths of a layer, for prompts and for all but the last token
            of what a reward model scores. Not with sequence parallelism, where positions lie on several ranks.
        """
        ranks = self.sequence_parallel
        if ranks is not None and at is not None:
            raise ValueError("with sequence parallelism the backbone returns this rank's positions: select them later.")
        if ranks is not None:
            if max_seqlen is not None:
                max_seqlen = max(max_seqlen, ranks.padding(len(ids)))
            cu_seqlens = ranks.pad_sequences(cu_seqlens, len(ids))
            ids = ranks.shard(ids, 0)
        packing = self.packing(cu_seqlens, max_seqlen)
        x = self.tok_embeddings(ids)
        for left, layer in zip(reversed(range(len(self.layers))), self.layers):
            read = None if left else at
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(layer, x, packing, read, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, packing, read)
        return self.norm(x)

    def packing(self, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Packing:
        """The rotation tables and bounds that every layer shares."""
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
        if self.rope.length_matters and max_seqlen > self.config.max_position_embeddings:
            cos, sin, offsets = self.rope.tables(cu_seqlens.diff().tolist(), cu_seqlens.device)
        else:
            (cos, sin), offsets = self.rope.table(max(max_seqlen, 1), cu_seqlens.device), None
        return Packing(cu_seqlens, max_seqlen, cos, sin, offsets, self.backend, self.sequence_parallel)


class LMHead(Linear):
    """Hidden states to logits, or straight to the loss or the log-probabilities.

    One forward for all, so that engines that gather weights see it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor | None = None, temperature: float | None = None) -> Any:
        if labels is None:
            return super().forward(hidden)
        if temperature is not None:
            return token_logprobs(hidden, self.weight, labels, temperature=temperature)
        return cross_entropy_sum(hidden, self.weight, labels)


class CausalLM(nn.Module):
    """The language model. With tied embeddings there is no `output`: tok_embeddings serves as the output matrix."""

    def __init__(self, config: ModelConfig, *, attention: str = "auto", recompute: str = "none"):
        super().__init__()
        self.config = config
        self.model = InternLM2(config, attention=attention, recompute=recompute)
        self.output = None if config.tie_embeddings else LMHead(config)

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: str = "auto",
        recompute: str = "none",
        seed: int | None = 0,
    ) -> "CausalLM":
        """A new model; see `new_model`."""
        return new_model(
            lambda: cls(config, attention=attention, recompute=recompute),
            config,
            device=device,
            dtype=dtype,
            seed=seed,
        )

    @property
    def output_weight(self) -> Tensor:
        """The output matrix [V, C]."""
        return self.model.tok_embeddings.weight if self.output is None else self.output.weight

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits [T, V]; with `labels` [T] int64 the summed loss instead, and no logits in memory at once."""
        hidden, ranks = self.model(ids, cu_seqlens, max_seqlen), self.model.sequence_parallel
        if ranks is None:
            return self.head(hidden, labels)
        if labels is None:
            return ranks.gather(self.head(hidden), len(ids))
        return ranks.sum(self.head(hidden, ranks.shard(labels, IGNORE)))

    def head(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden [..., C] -> logits [..., V], or the summed loss (float32 scalar) where labels are given."""
        if self.output is not None:
            return self.output(hidden, labels)
        weight = self.model.tok_embeddings.weight
        return hidden @ weight.t() if labels is None else cross_entropy_sum(hidden, weight, labels)

    def logprobs(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        at: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of `labels` [A] as the tokens after positions `at` [A] of the packed row, and the
        entropies there, each [A] float32, natural, of softmax(logits / temperature). Gradient flows.

        Only these positions go through the end of the last layer and meet the output matrix.
        """
        ranks = self.model.sequence_parallel
        if ranks is None:
            return self._logprobs(self.model(ids, cu_seqlens, max_seqlen, at), labels, temperature)
        hidden = self.model(ids, cu_seqlens, max_seqlen)
        mine = at // len(hidden) == ranks.rank
        found = self._logprobs(hidden[at[mine] - ranks.rank * len(hidden)], labels[mine], temperature)
        logprobs, entropies = (ranks.sum(part.new_zeros(len(at)).masked_scatter(mine, part)) for part in found)
        return logprobs, entropies

    def _logprobs(self, hidden: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        if self.output is not None:
            return self.output(hidden, labels, temperature)
        return token_logprobs(hidden, self.model.tok_embeddings.weight, labels, temperature=temperature)

    def loss(
        self, ids: Tensor, labels: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed cross entropy (nats, float32 scalar) and the number of labels that count (int64 scalar).

        labels[t] is the target of position t, shifted already; -100 is no target.
        """
        return self(ids, cu_seqlens, max_seqlen, labels), (labels >= 0).sum()

    def token_losses(self, ids: Tensor, labels: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        """Cross entropy of each position, [T] float32, 0 where the label is -100. Gradient flows."""
        hidden, ranks = self.model(ids, cu_seqlens, max_seqlen), self.model.sequence_parallel
        if ranks is None:
            return token_cross_entropy(hidden, self.output_weight, labels)
        mine = token_cross_entropy(hidden, self.output_weight, ranks.shard(labels, IGNORE))
        return ranks.gather(mine, len(ids))
