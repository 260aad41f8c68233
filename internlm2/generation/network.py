"""The network as generation runs it: the model's arithmetic, with weights packed, projections merged and no autograd.

B rows, T packed tokens, C hidden size, G kv heads, R queries per kv head, H = G * R, D head dim, V vocabulary. It
rounds where `internlm2.model` rounds, so that log-probabilities agree with what training computes.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm2.config import ConfigError
from internlm2.generation.cache import SlotCache
from internlm2.generation.projections import ACT_BITS, projection
from internlm2.model.transformer import CausalLM, Layer
from internlm2.ops import Decoder, DecoderLayer, Projection, first_rows, prefill_attention
from internlm2.ops.reference import rotate, table_rows


class Network:
    """A CausalLM's weights as they are now; `refresh` takes them again after a training step.

    dtype     of the arithmetic: None takes the weights' own
    quantize  none, w8 or w4: the layers' matrices rounded to 8 or 4 bits, the output matrix to 8
    """

    def __init__(self, model: CausalLM, *, dtype: torch.dtype | None = None, quantize: str = "none"):
        self.model, self.config, self.quantize = model, model.config, quantize
        self.dtype = dtype or model.output_weight.dtype
        self.refresh()

    @property
    def device(self) -> torch.device:
        return self.model.output_weight.device

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the model's weights again. Needed after they change: packed and quantized weights are copies."""
        backbone = self.model.model
        # fp32 embeddings and norms are small; the embedding is looked up and then rounded, a copy would double it
        self.embeddings = backbone.tok_embeddings.weight.detach()
        self.output = projection([self.model.output_weight], self.dtype, "none" if self.quantize == "none" else "w8")
        self.decoder = Decoder(
            [self._layer(layer) for layer in backbone.layers if isinstance(layer, Layer)],
            backbone.norm.weight.detach().to(self.dtype),
            heads=self.config.heads,
            eps=self.config.norm_eps,
            attention=backbone.backend,
            act_bits=ACT_BITS,
        )

    def release(self) -> None:
        """Let go of these copies. Nothing can be computed until `refresh`."""
        del self.output, self.decoder

    def _layer(self, layer: Layer) -> DecoderLayer:
        def pack(*modules: nn.Module) -> Projection:
            if not all(isinstance(module, nn.Linear) for module in modules):
                raise ConfigError("generation takes plain weights: merge the adapter into them first.")
            return projection([cast(Tensor, module.weight) for module in modules], self.dtype, self.quantize)

        return DecoderLayer(
            layer.attention_norm.weight.detach().to(self.dtype),
            pack(layer.attention.wqkv),
            pack(layer.attention.wo),
            layer.ffn_norm.weight.detach().to(self.dtype),
            pack(layer.feed_forward.w1, layer.feed_forward.w3),
            pack(layer.feed_forward.w2),
        )

    def new_cache(self) -> SlotCache:
        return SlotCache(self.config, self.model.model.rope, self.device, self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, C] -> [B, V] in the dtype of the arithmetic."""
        return self.output(hidden)

    def prefill(
        self, ids: Tensor, lengths: list[int], slots: list[int], cache: SlotCache, past: list[int] | None = None
    ) -> Tensor:
        """Read packed prompts ids [T] into slots of the cache -> hidden [n, C] of each prompt's last token.

        past  tokens of each prompt that its slot holds already; `ids` and `lengths` are then those of the rest
        """
        past = past or [0] * len(lengths)
        groups, dim = self.config.kv_heads, self.config.head_dim
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(self.device)
        slot = torch.tensor(slots, device=self.device)
        offsets = None if cache.offsets is None else cache.offsets[slot]
        counts = torch.tensor(lengths, device=self.device)
        positions = table_rows(bounds, first_rows(past, None, self.device), len(ids))
        places = cache.places(slot.repeat_interleave(counts, output_size=len(ids)), positions)
        at = table_rows(bounds, first_rows(past, offsets, self.device), len(ids))
        cos, sin = cache.cos[at], cache.sin[at]
        x = F.embedding(ids, self.embeddings).to(self.dtype)
        decoder, backend = self.decoder, self.model.model.backend
        for index, layer in enumerate(decoder.layers):
            qkv = layer.wqkv(decoder.normed(x, layer.attention_norm)).view(len(ids), groups, -1, dim)
            keys = rotate(qkv[:, :, -2], cos, sin).to(qkv.dtype)
            cache.store(index, places, torch.stack((keys, qkv[:, :, -1]), dim=2))
            out = prefill_attention(
                qkv, cache.layers[index], slot, past, cache.cos, cache.sin, bounds, max(lengths),
                table_offsets=offsets, backend=backend,
            )  # fmt: skip
            x = decoder.feed_forward(x + layer.wo(out.flatten(1)), layer)
        cache.lengths[slot] = (counts + torch.tensor(past, device=self.device)).to(cache.lengths)
        return decoder.normed(x[bounds[1:].long() - 1], decoder.norm)

    def decode(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """One more token for each of the first B slots, ids [B] int64 -> hidden [B, C]; each slot grows by one."""
        x = F.embedding(ids, self.embeddings).to(self.dtype)
        return self.decoder.step(x, cache.layers, cache.lengths, cache.cos, cache.sin, cache.offsets)
