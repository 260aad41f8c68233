"""A model sharded by ZeRO 3 as a plain module for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def gathered(deepspeed_engine: Any, stage: int) -> Iterator[None]:
    """All weights on every rank, and none of the hooks that gather and release them; nothing to do below ZeRO 3.

    Ranks may run different numbers of passes inside, and generation is about twice as fast as through the hooks.
    Collective at both ends. On a GPU it needs memory for the whole model in its training dtype.
    """
    if stage < 3:
        yield
        return
    import deepspeed

    optimizer = deepspeed_engine.optimizer
    offload = getattr(optimizer, "parameter_offload", optimizer)  # a frozen model's optimizer is the offload itself
    parameters = list(deepspeed_engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
