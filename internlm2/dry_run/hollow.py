"""Tensors that have a shape and no contents, ranks that are not there, and the memory that both would take.

torch's FakeTensorMode runs every operation on shapes alone, and its fake process group answers every collective of one
rank at once. What is added here lets code that looks at values pass (a norm reads as 1, a flag as not set), keeps
host-side integers such as sequence bounds real, and counts the bytes of every storage from birth to death.
"""

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from internlm2.dry_run.pieces import one_piece_for_all
from internlm2.engine import process_group
from internlm2.run.ranks import Ranks

_READ_VALUE = torch.ops.aten._local_scalar_dense.default


class HollowMode(FakeTensorMode):
    """Runs code on shapes; `live` and `peak` are the bytes of all storages that exist, now and at most."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(type(argument) is FakeTensor for argument in args):  # the usual case, found without a walk
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            hollow = any(isinstance(tensor, FakeTensor) for tensor in tensors)
            if tensors and not hollow and not any(tensor.is_floating_point() for tensor in tensors):
                with unset_fake_temporarily():  # host-side integers, such as where sequences begin
                    return func(*args, **(kwargs or {}))
        if func is _READ_VALUE:
            return _value(args[0])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, FakeTensor):
                self._count(leaf.untyped_storage())
        return out

    def reset_peak(self) -> None:
        self.peak = self.live

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key].alive:
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        self._known.pop(key, None)


def _value(tensor: FakeTensor) -> bool | int | float:
    """What a tensor without contents reads as: its constant where it has one, else 1, and a flag as not set.

    A flag is what DeepSpeed asks for an overflow, upon which it would leave out the update and its memory.
    """
    if tensor.constant is not None:
        return tensor.constant.item()
    if tensor.dtype in (torch.bool, torch.uint8):
        return False
    return 1.0 if tensor.is_floating_point() else 1


@contextlib.contextmanager
def as_rank(rank: int, world_size: int, per_node: int) -> Iterator[Ranks]:
    """This process as `rank` of `world_size`: collectives return at once, as if every rank gave what this one does."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    place = Ranks(rank, world_size, rank % per_node, min(per_node, world_size))
    before = {name: os.environ.get(name) for name in place.environment()}
    os.environ.update(place.environment())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    kept = process_group.sum_over_ranks, process_group.gather_over_ranks
    process_group.sum_over_ranks = lambda values, group=None: [dist.get_world_size(group) * float(v) for v in values]
    process_group.gather_over_ranks = lambda value: [float(value)] * world_size
    try:
        yield place
    finally:
        process_group.sum_over_ranks, process_group.gather_over_ranks = kept
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def hollow() -> Iterator[HollowMode]:
    """Everything inside runs on shapes; modules convert in place, and ranks are not compared with each other."""
    kept = nn.Module._apply
    comparing = _comparisons()
    nn.Module._apply = _apply_in_place  # type: ignore[method-assign]
    for module, _ in comparing:
        module.assert_ints_same_as_other_ranks = lambda ints: None
    try:
        with one_piece_for_all(), HollowMode() as mode:
            yield mode
    finally:
        nn.Module._apply = kept  # type: ignore[method-assign]
        for module, function in comparing:
            module.assert_ints_same_as_other_ranks = function


def _comparisons() -> list[tuple[Any, Callable[..., Any]]]:
    """DeepSpeed's modules that compare integers with those of rank 0, which a fake group cannot tell."""
    name = "assert_ints_same_as_other_ranks"
    loaded = [module for key, module in list(sys.modules.items()) if key.startswith("deepspeed.")]
    return [(module, getattr(module, name)) for module in loaded if hasattr(module, name)]


def _apply_in_place(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply swaps whole tensors where they are fake, which other references to them forbid."""
    with torch.no_grad():
        for part in module.modules():
            for parameter in part._parameters.values():
                if parameter is not None:
                    parameter.data = fn(parameter.data)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = fn(buffer)
    return module
