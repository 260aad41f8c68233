"""The key/value cache of one batch of growing sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from internlm2.config import ModelConfig
from internlm2.model.rope import RopeTables


class KVCache:
    """Rotated keys and values [B, G, L, D] for each layer, and how many entries of each row are valid.

    Each row names the length that it may grow to. Under dynamic NTK that fixes the row's RoPE base at once, so that
    cached keys and later queries share one rotation (the released code rotates new keys by a new base and leaves the
    old ones).
    """

    def __init__(
        self, config: ModelConfig, rope: RopeTables, limits: Sequence[int], device: torch.device, dtype: torch.dtype
    ):
        self.limits = list(limits)
        shape = (len(self.limits), config.kv_heads, max(self.limits, default=0), config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.lengths = torch.zeros(len(self.limits), dtype=torch.int32, device=device)
        self.cos, self.sin, self.table_offsets = rope.tables(self.limits, device)

    @property
    def rows(self) -> int:
        return len(self.limits)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Position of the next token of each row [B] int64, and its row in the cos/sin table [B] int64."""
        positions = self.lengths.long()
        return positions, positions if self.table_offsets is None else positions + self.table_offsets

    def fill(self, layer: int, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [N, G, D] at (rows [N], positions [N])."""
        self.keys[layer][rows, :, positions] = keys
        self.values[layer][rows, :, positions] = values

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows` [K] int64: a finished sequence should cost nothing."""
        chosen = rows.tolist()
        self.limits = [self.limits[row] for row in chosen]
        capacity = max(self.limits, default=0)
        self.keys = [keys[rows, :, :capacity] for keys in self.keys]
        self.values = [values[rows, :, :capacity] for values in self.values]
        self.lengths = self.lengths[rows]
        if self.table_offsets is not None:
            self.table_offsets = self.table_offsets[rows]
