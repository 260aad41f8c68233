"""Rotary position embedding: the base for a length, and cos/sin tables in float64 that grow as needed.

Extrapolation is a matter of the table alone. Linear scaling divides positions by the factor. Dynamic NTK raises the
base once a sequence is longer than `max_position_embeddings` M and never touches positions; it is what the released
chat models ship with (formula of their modelling code). A changed base (report 3.2: 50,000 -> 1,000,000) is just
another `rope_base`.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from internlm2.config import ConfigError, ModelConfig

SMALLEST_TABLE = 256
TABLES_KEPT = 4


def rope_base(config: ModelConfig, length: int) -> float:
    """RoPE base for a sequence of `length` tokens; only dynamic NTK beyond M = max_position_embeddings changes it.

    base' = base * (f * L / M - (f - 1)) ** (d / (d - 2)) with factor f, length L and head dim d.
    """
    scaling, m, d = config.rope_scaling, config.max_position_embeddings, config.head_dim
    if scaling.kind != "dynamic" or length <= m:
        return config.rope_base
    if d == 2:
        raise ConfigError("model.rope_scaling.kind=dynamic needs model.head_dim above 2: the exponent is d / (d - 2).")
    f = scaling.factor
    return config.rope_base * (f * length / m - (f - 1)) ** (d / (d - 2))


def rope_table(
    base: float, head_dim: int, positions: int, *, factor: float = 1.0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin of position / factor * base ** (-2 i / head_dim), each float32 [positions, head_dim // 2].

    Angles are float64: in float32 position * frequency is off by 6e-3 rad at position 100,000.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = torch.pow(torch.tensor(base, dtype=torch.float64), -exponents)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64) / factor, frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)


class RopeTables:
    """Hands out tables for packed sequences; keeps the last few, and doubles them when a longer one is asked for.

    Not a module: tables follow from the config, so they belong in no checkpoint and are never cast to bfloat16.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self._tables: OrderedDict[tuple[float, torch.device], tuple[Tensor, Tensor]] = OrderedDict()

    @property
    def length_matters(self) -> bool:
        """True where the base depends on each sequence's length (dynamic NTK)."""
        return self.config.rope_scaling.kind == "dynamic"

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """One table with at least `length` rows, float32 [P, D // 2] each, for sequences of at most that length."""
        base = rope_base(self.config, length)
        key = (base, device)
        found = self._tables.get(key)
        if found is None or len(found[0]) < length:
            scaling = self.config.rope_scaling
            factor = scaling.factor if scaling.kind == "linear" else 1.0
            # The base of a stretched table fits one length only, so nothing is gained by making it longer.
            grown = length if base != self.config.rope_base else max(SMALLEST_TABLE, 1 << (length - 1).bit_length())
            with torch.inference_mode(False):  # a table made while sampling must serve training later
                found = rope_table(base, self.config.head_dim, grown, factor=factor, device=device)
            self._tables[key] = found
        self._tables.move_to_end(key)
        while len(self._tables) > TABLES_KEPT:
            self._tables.popitem(last=False)
        return found

    def tables(self, lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tables stacked for sequences that need different bases, and the first row of each sequence, [n] int32.

        The offsets are None where one table serves all.
        """
        longest_of_base: OrderedDict[float, int] = OrderedDict()
        bases = [rope_base(self.config, length) for length in lengths]
        for base, length in zip(bases, lengths):
            longest_of_base[base] = max(length, longest_of_base.get(base, 1))
        if len(longest_of_base) <= 1:
            return *self.table(max(lengths, default=1), device), None
        first_row, pieces, row = {}, [], 0
        for base, longest in longest_of_base.items():
            cos, sin = self.table(longest, device)
            first_row[base] = row
            pieces.append((cos[:longest], sin[:longest]))
            row += longest
        cos, sin = (torch.cat(piece) for piece in zip(*pieces))
        return cos, sin, torch.tensor([first_row[base] for base in bases], dtype=torch.int32, device=device)
