"""Several engines as one checkpoint: PPO's actor and critic are saved, and found again, as a unit."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from internlm2.engine.base import KINDS, Engine, Fragment


class Together:
    """What `CheckpointWriter` and `CheckpointReader` ask of an engine, over engines by prefix.

    A prefix goes before the names of an engine's parameters; one engine may have the empty prefix, so that its weights
    keep the names by which every other program finds them. `step` is the caller's own count.
    """

    def __init__(self, engines: Mapping[str, Engine], step: int = 0) -> None:
        self.engines = dict(engines)
        self.step = step
        first = next(iter(self.engines.values()))
        self.rank, self.world_size, self.device, self.model = first.rank, first.world_size, first.device, first.model
        self._reduce = first.reduce_sum

    def reduce_sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values)

    @property
    def saves(self) -> bool:
        """All of them lie on the same ranks in the same way."""
        return next(iter(self.engines.values())).saves

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {prefix + name: shape for prefix, e in self.engines.items() for name, shape in e.shapes().items()}

    def fragments(self, kinds: Sequence[str] = KINDS) -> Iterator[Fragment]:
        for prefix, engine in self.engines.items():
            for fragment in engine.fragments(kinds):
                yield fragment._replace(name=prefix + fragment.name)

    def fragments_changed(self) -> None:
        for engine in self.engines.values():
            engine.fragments_changed()

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for prefix, engine in self.engines.items():
            for name, tensor in engine.full_weights():
                yield prefix + name, tensor

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "engines": {prefix: e.state_dict() for prefix, e in self.engines.items()}}

    def load_state_dict(self, state: dict[str, Any], *, after_rollback: bool = False) -> None:
        self.step = int(state["step"])
        for prefix, engine in self.engines.items():
            engine.load_state_dict(state["engines"][prefix], after_rollback=after_rollback)
