"""The network as generation runs it: the model's arithmetic, with weights packed, projections merged and no autograd.

B rows, T packed tokens, C hidden size, G kv heads, R queries per kv head, H = G * R, D head dim, V vocabulary. It
rounds where `internlm2.model` rounds, so that log-probabilities agree with what training computes.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm2.config import ConfigError
from internlm2.generation.cache import SlotCache
from internlm2.generation.projections import Projection, projection
from internlm2.model.transformer import CausalLM, Layer
from internlm2.ops import decode_attention, rope_attention
from internlm2.ops.reference import rotate, table_rows


@dataclass
class _Block:
    """One layer's weights: the norms [C], and the four projections; `gate_up` is w1 and w3 in one."""

    attention_norm: Tensor
    wqkv: Projection
    wo: Projection
    ffn_norm: Tensor
    gate_up: Projection
    down: Projection


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
        self.norm = backbone.norm.weight.detach().to(self.dtype)
        self.output = projection([self.model.output_weight], self.dtype, "none" if self.quantize == "none" else "w8")
        self.blocks = [self._block(layer) for layer in backbone.layers if isinstance(layer, Layer)]

    def _block(self, layer: Layer) -> _Block:
        def pack(*modules: nn.Module) -> Projection:
            if not all(isinstance(module, nn.Linear) for module in modules):
                raise ConfigError("generation takes plain weights: merge the adapter into them first.")
            return projection([cast(Tensor, module.weight) for module in modules], self.dtype, self.quantize)

        return _Block(
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
        """hidden [B, C] -> [B, V] float32."""
        return self.output(hidden).float()

    def prefill(self, ids: Tensor, lengths: list[int], slots: list[int], cache: SlotCache) -> Tensor:
        """Read packed prompts ids [T] into empty slots of the cache -> hidden [n, C] of each prompt's last token."""
        groups, dim = self.config.kv_heads, self.config.head_dim
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(self.device)
        slot = torch.tensor(slots, device=self.device)
        offsets = None if cache.offsets is None else cache.offsets[slot]
        counts = torch.tensor(lengths, device=self.device)
        positions = table_rows(bounds, None, len(ids))
        places = cache.places(slot.repeat_interleave(counts, output_size=len(ids)), positions)
        at = table_rows(bounds, offsets, len(ids))
        cos, sin = cache.cos[at], cache.sin[at]
        x = F.embedding(ids, self.embeddings).to(self.dtype)
        for index, block in enumerate(self.blocks):
            qkv = block.wqkv(self._normed(x, block.attention_norm)).view(len(ids), groups, -1, dim)
            keys = rotate(qkv[:, :, -2], cos, sin).to(qkv.dtype)
            cache.store(index, places, torch.stack((keys, qkv[:, :, -1]), dim=2))
            out = rope_attention(
                qkv, cache.cos, cache.sin, bounds, max(lengths), table_offsets=offsets, backend=self.model.model.backend
            )
            x = self._feed_forward(x + block.wo(out.flatten(1)), block)
        cache.lengths[slot] = counts.to(cache.lengths)
        return self._normed(x[bounds[1:].long() - 1], self.norm)

    def decode(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """One more token for each of the first B slots, ids [B] int64 -> hidden [B, C]; each slot grows by one."""
        rows, groups, dim = len(ids), self.config.kv_heads, self.config.head_dim
        lengths = cache.lengths[:rows]
        places = cache.places(torch.arange(rows, device=self.device), lengths.long())
        cos, sin = self._rotation(cache, lengths)
        lengths += 1
        x = F.embedding(ids, self.embeddings).to(self.dtype)
        for index, block in enumerate(self.blocks):
            qkv = block.wqkv(self._normed(x, block.attention_norm)).view(rows, groups, -1, dim)
            wide = qkv.float()
            rotated = (wide * cos + wide.roll(dim // 2, -1) * sin).to(qkv.dtype)
            cache.store(index, places, rotated[:, :, -2:])
            out = decode_attention(
                rotated[:, :, :-2].reshape(rows, -1, dim),
                cache.keys(index, rows),
                cache.values(index, rows),
                lengths,
                backend=self.model.model.backend,
            )
            x = self._feed_forward(x + block.wo(out.flatten(1)), block)
        return self._normed(x, self.norm)

    def _rotation(self, cache: SlotCache, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, R + 2, D] for the grouped projection of the next tokens: y = x * cos + roll(x) * sin.

        The value's slot has cos 1 and sin 0 and passes through unchanged, so one expression serves all slots.
        """
        at = lengths.long() if cache.offsets is None else lengths.long() + cache.offsets[: len(lengths)]
        cos, sin = cache.cos[at], cache.sin[at]
        cos, sin = torch.cat((cos, cos), -1)[:, None, None], torch.cat((-sin, sin), -1)[:, None, None]
        slots = self.config.q_per_kv + 1
        cos = torch.cat((cos.expand(-1, -1, slots, -1), torch.ones_like(cos)), 2)
        return cos, torch.cat((sin.expand(-1, -1, slots, -1), torch.zeros_like(sin)), 2)

    def _feed_forward(self, x: Tensor, block: _Block) -> Tensor:
        gate, up = block.gate_up(self._normed(x, block.ffn_norm)).chunk(2, dim=-1)
        return x + block.down(F.silu(gate).mul_(up))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm, float32 inside, rounded before the weight as in `internlm2.model.norm`."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = norm.square_().div_(x.shape[-1]).add_(self.config.norm_eps).rsqrt_()
        return (x * rstd).to(x.dtype) * weight
