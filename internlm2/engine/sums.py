"""Running sums of a loss over micro-batches, kept on the device until one read at the end of a step."""

from collections.abc import Callable, Sequence

import torch

from internlm2.engine.base import LossSum


class LossSums:
    """Adds LossSums in fp64, so that any split of a batch shows the same loss to the last digit that anybody prints."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: torch.Tensor | None = None
        self._parts: dict[str, torch.Tensor] = {}

    def add(self, loss: LossSum) -> None:
        """Without waiting for the device."""
        self.tokens += loss.tokens
        total = loss.sum.detach().double()
        self._sum = total if self._sum is None else self._sum + total
        for key, value in loss.parts.items():
            part = value.detach().double()
            self._parts[key] = self._parts[key] + part if key in self._parts else part

    def read(self, reduce_sum: Callable[[Sequence[float]], list[float]]) -> tuple[int, float, dict[str, float]]:
        """(tokens, sum, parts) over all ranks; waits for the device."""
        if self._sum is None:
            values = [0.0]
        else:
            values = torch.stack([self._sum, *self._parts.values()]).tolist()
        tokens, total, *parts = reduce_sum([float(self.tokens), *values])
        return int(tokens), total, dict(zip(self._parts, parts, strict=True))
