"""Initial weights: a function of (seed, parameter name) alone, so no construction order and no sharding changes them.

The report does not state the initialisation; this is InternEvo's code. Normal with std `initializer_range` (0.02) for
the embedding, wqkv, w1, w3 and the output matrix; wo and w2 of layer i use std / sqrt(2 (i + 1)), by their own depth,
not by the total depth. Norm weights are one.
"""

import hashlib
import math
import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from internlm2.config import ModelConfig

Model = TypeVar("Model", bound=nn.Module)

# Values are drawn in blocks with a generator each, so that a rank can make its own slice of a large matrix alone.
BLOCK = 1 << 20
_RESIDUAL = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:attention\.wo|feed_forward\.w2)\.weight$")


def initial_std(name: str, initializer_range: float) -> float:
    """Standard deviation of the parameter `name` (official names, with or without the leading `model.`)."""
    found = _RESIDUAL.search(name)
    return initializer_range / math.sqrt(2 * (int(found[1]) + 1)) if found else initializer_range


def initial_values(
    name: str, numel: int, config: ModelConfig, seed: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """Elements start..stop of the flattened parameter `name` of `numel` elements, float32 [stop - start] on the CPU."""
    stop = numel if stop is None else stop
    if not 0 <= start <= stop <= numel:
        raise ValueError(f"{name}: the range {start}..{stop} does not lie in its {numel} elements.")
    if name.endswith("norm.weight"):
        return torch.ones(stop - start)
    std, values = initial_std(name, config.initializer_range), torch.empty(stop - start)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = block * BLOCK, min((block + 1) * BLOCK, numel)
        drawn = torch.empty(last - first).normal_(0.0, std, generator=_generator(seed, name, block))
        low, high = max(first, start), min(last, stop)
        values[low - start : high - start] = drawn[low - first : high - first]
    return values


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, seed: int, prefix: str = "") -> None:
    """Fill every parameter of `module` in place; `prefix` is what stands before its names in the whole model."""
    for name, parameter in module.named_parameters():
        values = initial_values(prefix + name, parameter.numel(), config, seed)
        parameter.copy_(values.view(parameter.shape))


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def new_model(
    build: Callable[[], Model], config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype, seed: int | None
) -> Model:
    """What `build` makes, in `dtype` on `device`, with initial values from `seed`.

    `seed=None` leaves the memory as it comes, for weights that are loaded next. On device="meta" nothing is allocated:
    shapes, names and counts only.
    """
    with torch.device("meta"):
        model = build()
    model = model.to(dtype)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    if seed is not None:
        initialize(model, config, seed)
    return model
