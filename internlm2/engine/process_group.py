"""The ranks' process group: made once for the whole process, before the first model."""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from internlm2.run.ranks import Ranks, from_environment

_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")


def join(device: torch.device, timeout_seconds: float = 1800.0) -> Ranks:
    """Enter the process group of all ranks, and return this one's place in it; where there is one already, keep it.

    Tensors on a GPU go through NCCL and those on the host through gloo. `timeout_seconds` bounds every collective: a
    rank whose peer has died or hangs fails after it, at the latest. One rank without a launcher needs no address.
    """
    ranks = from_environment()
    if dist.is_initialized():
        return ranks
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if ranks.world_size == 1 and not all(name in os.environ for name in _RENDEZVOUS):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(
            backend, init_method="env://", rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
        )
    return ranks


def sum_over_ranks(values: Sequence[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Sum each value over the ranks in float64; the same result on each. One rank gets its own values back."""
    if not values or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=group)
    return [float(value) for value in tensor.tolist()]


def gather_over_ranks(value: float) -> list[float]:
    """Each rank's value, in the order of the ranks, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [float(value)]
    values = [0.0] * dist.get_world_size()
    values[dist.get_rank()] = float(value)
    return sum_over_ranks(values)


def barrier() -> None:
    """Wait until every rank is here."""
    sum_over_ranks([0.0])
