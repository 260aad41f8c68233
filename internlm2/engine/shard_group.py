"""Optimizer state sharded inside a group of ranks, and repeated in every group: a node's links carry the sharding.

At 1,024 GPUs a partition of each parameter over all ranks makes tiny messages over the slowest links; the report shards
inside a node instead (report 2.1). Gradients are averaged inside the group by DeepSpeed, then added up between the
groups; each group then makes the same update. DeepSpeed has no such mode for ZeRO 1 and 2.
"""

from typing import Any

import torch.distributed as dist


class ShardGroup:
    """This rank's group of `size` neighbouring ranks, and the ranks that hold the same shard in the other groups.

    DeepSpeed takes it as `mpu`, and asks it for the ranks to shard over. Collective: all ranks make all groups.
    """

    def __init__(self, size: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        self.size, self.copies = size, world // size
        self.copy = rank // size
        for start in range(0, world, size):
            group = dist.new_group(list(range(start, start + size)))
            if start <= rank < start + size:
                self.inside = group
        for shard in range(size):
            group = dist.new_group(list(range(shard, world, size)))
            if rank % size == shard:
                self.across = group

    def get_data_parallel_group(self) -> Any:
        return self.inside

    def get_data_parallel_world_size(self) -> int:
        return self.size

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.inside)

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
