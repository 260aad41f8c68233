"""Every rank's piece of a tensor without contents, at the cost of one piece.

DeepSpeed cuts buffers into one view a rank, and ZeRO 3 does so for each parameter that it gathers and each gradient
that it reduces: a thousand operations on shapes, of 0.1 ms each, where a GPU's host needs a few microseconds. On shapes
equally long pieces are the same piece, so one stands for all; what is allocated and freed is what DeepSpeed allocates.
"""

import contextlib
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor


@contextlib.contextmanager
def one_piece_for_all() -> Iterator[None]:
    """Inside, tensors without contents and DeepSpeed's ZeRO 3, where it is loaded, work as the module says."""
    stage3: Any = sys.modules.get("deepspeed.runtime.zero.stage3")
    sharded: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    FakeTensor.narrow = _narrow  # type: ignore[method-assign, assignment]
    if stage3 is None or sharded is None:
        kept = None
    else:
        kept = stage3.reduce_scatter_coalesced, sharded.AllGatherCoalescedHandle.wait
        stage3.reduce_scatter_coalesced = _reduce_scatter
        sharded.AllGatherCoalescedHandle.wait = _wait
    try:
        yield
    finally:
        del FakeTensor.narrow
        if stage3 is not None and sharded is not None and kept is not None:
            stage3.reduce_scatter_coalesced, sharded.AllGatherCoalescedHandle.wait = kept


def _narrow(self: FakeTensor, dim: int, start: int, length: int) -> torch.Tensor:
    """torch.Tensor.narrow; of a flat tensor the last view of that length, as long as somebody holds it."""
    plain = torch.Tensor.narrow
    if self.dim() != 1 or self.requires_grad:
        return plain(self, dim, start, length)
    known = self.__dict__.get("_piece")
    piece = None if known is None or known[0] != length else known[1]()
    if piece is None:
        piece = plain(self, dim, start, length)
        self.__dict__["_piece"] = (length, weakref.ref(piece))
    return piece


def _reduce_scatter(tensors: Sequence[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
    """deepspeed.runtime.comm.coalesced_collectives.reduce_scatter_coalesced: this rank's piece of each sum.

    All ranks' pieces are copied into one padded buffer, except of a single tensor that needs no padding.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    shards = [-(-tensor.numel() // ranks) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() % ranks == 0:
        flat = tensors[0].view(-1)
    else:
        flat = tensors[0].new_empty(sum(shards) * ranks)
    mine = flat.narrow(0, rank * sum(shards), sum(shards))
    return [
        mine.narrow(0, sum(shards[:number]), max(0, min(shard, tensor.numel() - rank * shard)))
        for number, (tensor, shard) in enumerate(zip(tensors, shards))
    ]


def _wait(self: Any, handle_dependency: bool = True) -> None:
    """AllGatherCoalescedHandle.wait: each parameter gets memory of its own, beside the buffer that was gathered."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if self.complete:
        return
    self.allgather_handle.wait()
    for parameter in self.params:
        parameter.data = torch.empty(
            parameter.ds_shape, dtype=parameter.ds_tensor.dtype, device=self.partitions[0].device
        )
        parameter.ds_status = ZeroParamStatus.AVAILABLE
    self.complete = True
