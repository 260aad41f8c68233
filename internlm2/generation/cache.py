"""Keys and values of the rows that are being generated: compact slots, shared by nobody, reused by everybody.

Slots instead of pages. The decoder's time goes into reading keys and values; a slot is read in one straight run, while
pages need a kernel with a block table, or a gather that costs four times the attention itself (64 rows of 256 tokens of
SmolLM2-135M, one layer, one core: 4.2 against 1.1 ms). What pages would save is handled otherwise: slots grow in steps
with the longest row in them, a finished row's slot is given to the next prompt, and the first B slots are always the
active ones. What is not saved: samples of one prompt, and prompts that begin alike, share their computation, not their
memory.
"""

import torch
from torch import Tensor

from internlm2.config import ModelConfig
from internlm2.model.rope import RopeTables, rope_base

# Slots grow in such steps, tokens.
STEP = 64


class SlotCache:
    """One tensor a layer, [slots, G, 2, L, D]: for each kv head the rotated keys, then the values.

    lengths  [slots] int32, valid tokens of each slot
    """

    def __init__(self, config: ModelConfig, rope: RopeTables, device: torch.device, dtype: torch.dtype):
        self.groups, self.head_dim = config.kv_heads, config.head_dim
        self.rope, self.device = rope, device
        shape = (0, config.kv_heads, 2, 0, config.head_dim)
        self.layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.lengths = torch.zeros(0, dtype=torch.int32, device=device)
        self.limits: list[int] = []
        self.cos, self.sin, self.offsets = rope.tables([], device)

    @property
    def slots(self) -> int:
        return self.layers[0].shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that a slot holds."""
        return self.layers[0].shape[3]

    @property
    def bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, slots: int, tokens: int, most_slots: int, budget: int) -> None:
        """Make room for `slots` rows of `tokens` tokens; what lies in later slots may be dropped.

        Grows by doubling as long as slots x tokens stays within the budget, else to what was asked for.
        """
        new_slots, new_tokens = self.slots, self.capacity
        if slots > new_slots:
            new_slots = max(slots, min(2 * new_slots, most_slots))
        if tokens > new_tokens:
            new_tokens = round_up(max(tokens, 2 * new_tokens))
        if new_slots * new_tokens > budget:
            new_slots, new_tokens = slots, round_up(tokens)
        if (new_slots, new_tokens) == (self.slots, self.capacity):
            return
        kept, length = min(self.slots, new_slots), min(self.capacity, new_tokens)
        for index, old in enumerate(self.layers):  # one layer at a time: the peak is one layer above the new size
            # Zeros, not fresh memory: torch's attention multiplies what lies behind a row's end by 0.
            new = old.new_zeros(new_slots, self.groups, 2, new_tokens, self.head_dim)
            new[:kept, :, :, :length] = old[:kept, :, :, :length]
            self.layers[index] = new
        lengths = self.lengths.new_zeros(new_slots)
        lengths[:kept] = self.lengths[:kept]
        self.lengths = lengths

    def rotate_by(self, limits: list[int]) -> None:
        """The tables for rows that may grow to these lengths, in slot order.

        Under dynamic NTK a row's limit fixes its base at once, so that cached keys and later queries share one
        rotation.
        """
        self.limits = limits
        self.cos, self.sin, self.offsets = self.rope.tables(limits, self.device)

    def base(self, limit: int) -> float:
        """RoPE base of a row that ends at `limit` tokens."""
        return rope_base(self.rope.config, limit)

    def keys(self, layer: int, rows: int) -> Tensor:
        """[rows, G, L, D] of the first `rows` slots."""
        return self.layers[layer][:rows, :, 0]

    def values(self, layer: int, rows: int) -> Tensor:
        return self.layers[layer][:rows, :, 1]

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where `store` puts the keys and values of N tokens: [N * G * 2] int64, for all layers alike."""
        inner = torch.arange(2 * self.groups, device=self.device)
        return ((slots[:, None] * (2 * self.groups) + inner) * self.capacity + positions[:, None]).flatten()

    def store(self, layer: int, places: Tensor, pairs: Tensor) -> None:
        """pairs [N, G, 2, D]: rotated key and value of each token and kv head."""
        self.layers[layer].view(-1, self.head_dim).index_copy_(0, places, pairs.reshape(-1, self.head_dim))

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """The first `length` tokens of each source slot (or of the only one) into the target beside it."""
        to, of = torch.tensor(targets, device=self.device), torch.tensor(sources, device=self.device)
        for layer in self.layers:
            layer[to, :, :, :length] = layer[of, :, :, :length]
        self.lengths[to] = self.lengths[of]


def round_up(tokens: int) -> int:
    """What a slot for so many tokens takes."""
    return -(-tokens // STEP) * STEP
