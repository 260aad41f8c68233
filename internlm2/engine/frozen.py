"""Models that are only read, with their weights spread over the ranks between two readings."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from internlm2.config.schema import EngineConfig
from internlm2.engine import process_group
from internlm2.engine.deepspeed_settings import frozen_settings, import_deepspeed
from internlm2.engine.whole import gathered


class FrozenModel:
    """A model without gradients on `device`, in the dtype that it has. `sharded`: each rank keeps 1 / ranks of it.

    `whole()` is a context that gives `module` as a plain module with all weights on every rank. A call of this object
    gathers a layer at a time instead, and needs as many calls on every rank. Both are collective where the model is
    sharded; outside them a sharded module has no weights.
    """

    def __init__(self, module: nn.Module, engine: EngineConfig, device: torch.device, *, sharded: bool = False) -> None:
        self.module = module.requires_grad_(False).eval()
        self._deepspeed: Any = None
        if not sharded:
            module.to(device)
            return
        ranks = process_group.join(device, engine.collective_seconds)
        deepspeed = import_deepspeed(device, ranks)
        deepspeed.utils.groups.mpu = None  # that of a trained model in this process would otherwise stay
        numbers = sum(parameter.numel() for parameter in module.parameters())
        self._deepspeed = deepspeed.initialize(model=_Called(module), config=frozen_settings(engine, numbers))[0]
        self._deepspeed.eval()

    def __call__(self, *arguments: Any) -> Any:
        """The module's result without gradients; all ranks at the same time."""
        with torch.no_grad():
            return (self._deepspeed or self.module)(*arguments)

    @property
    def sharded(self) -> bool:
        """Does each rank keep a part alone?"""
        return self._deepspeed is not None and dist.get_world_size() > 1

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The plain module with all its weights."""
        if self._deepspeed is None:
            yield self.module
            return
        with gathered(self._deepspeed, stage=3):
            yield self.module


class _Called(nn.Module):
    """DeepSpeed counts passes at the outermost module, which therefore must not be the one that `whole` gives out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)
