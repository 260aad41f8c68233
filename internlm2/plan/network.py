"""The shapes of a network as the plan counts them: weights, matrix products, bytes that pass through memory."""

from dataclasses import dataclass

from internlm2.config import ModelConfig


@dataclass(frozen=True)
class Network:
    """Shape of a decoder. `gated`: SwiGLU with three matrices and RoPE (InternLM, Llama); else GELU with two (MPT)."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @classmethod
    def of(cls, model: ModelConfig) -> "Network":
        return cls(
            name=model.name,
            hidden=model.hidden_size,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            intermediate=model.intermediate_size,
            vocabulary=model.vocab_size,
            tied=model.tie_embeddings,
        )

    @property
    def qkv_width(self) -> int:
        """Outputs of the fused projection of queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrix products."""
        attention = self.hidden * (self.qkv_width + self.query_width)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def embedding(self) -> int:
        """Weights of one embedding or output matrix."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, norms included."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer_weights + norms + self.embedding * (1 if self.tied else 2)

    @property
    def layer_elements(self) -> float:
        """Elements a token and layer that pass through memory outside matrix products and attention, forward.

        Two norms (read, write), two residual sums (read twice, write), the hand-over of queries, keys and values to
        the attention kernel, the activation; with RoPE, queries and keys once more.
        """
        shared = 10 * self.hidden + self.qkv_width + self.query_width
        if self.gated:
            return shared + 3 * self.intermediate + 2 * (self.heads + self.kv_heads) * self.head_dim
        return shared + self.qkv_width + 2 * self.intermediate

    def flops(self, tokens: float, seq_len: int) -> float:
        """Model FLOPs of forward and backward over `tokens` tokens in sequences of `seq_len`, without recomputation.

        6 for each weight of a matrix product (the output head included, the embedding not) and token; causal attention
        sees half of each sequence.
        """
        products = 6.0 * (self.layers * self.layer_weights + self.embedding)
        return tokens * (products + 6.0 * self.layers * self.query_width * (seq_len + 1))
