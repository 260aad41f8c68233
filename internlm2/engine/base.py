"""What every engine offers to a stage: one training step over many ranks, and its state as fragments by name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Batch(Protocol):
    """What an engine needs to know of a micro-batch."""

    @property
    def loss_tokens(self) -> int:
        """Number of units that the loss is averaged over: valid tokens, or pairs."""
        ...

    def to(self, device: torch.device) -> Any:
        """The same batch on `device`."""
        ...


@dataclass(frozen=True)
class LossSum:
    """A loss as a sum: `sum` fp32 scalar with a graph, over `tokens` units; `parts` detached scalar sums for the log.

    The keys of `parts` are the same on every rank and in every micro-batch of a step (a source that is absent has the
    sum 0).
    """

    sum: torch.Tensor
    tokens: int
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


LossFunction = Callable[[nn.Module, Any], LossSum]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, summed over all ranks and micro-batches.

    loss: mean over `loss_tokens`; grad_norm: before clipping, of the gradient of that mean; lr: of this step; parts:
    the sums of LossSum.parts over the whole batch, not divided. `verdict` is `applied`, `skipped` or `rollback`, and
    `reason` says why a step was not applied. The step counts either way: its data are consumed.
    """

    loss: float
    grad_norm: float
    lr: float
    loss_tokens: int
    applied: bool
    parts: dict[str, float] = field(default_factory=dict)
    verdict: str = "applied"
    reason: str = ""


@dataclass(frozen=True)
class EvalResult:
    """Sums over evaluation batches and ranks: `loss` is `sum / tokens`; parts are sums."""

    loss: float
    tokens: int
    parts: dict[str, float] = field(default_factory=dict)


class Fragment(NamedTuple):
    """A contiguous piece of one parameter's training state that this rank owns.

    kind: `weight` (fp32 master), `exp_avg` or `exp_avg_sq`. offset: first element in the flattened parameter of shape
    `shape`. view: 1-D fp32 view into the live state, so that writing to it changes the state.
    """

    name: str
    kind: str
    offset: int
    shape: tuple[int, ...]
    view: torch.Tensor


class Engine(Protocol):
    """One model in training. `single` is plain PyTorch in one process; engines over many ranks offer the same.

    Every method that needs other ranks is called by all of them at the same time.

    `rank`, `world_size`: among all processes. `data_rank`, `data_ranks`: which share of the rows is this rank's; ranks
    that share a row (sequence parallelism) have the same. `reduce_sum` sums floats over all ranks in float64, the same
    result on each (an any() of flags can be read from a sum as well); `sum_over_data` sums what follows from the data,
    which ranks that share a row count once. `rank_seconds` gives, on every rank, the seconds that each rank's own work
    took in the last step, so that a slow one can be found. `whole()` is a context that gives the model as a plain
    module with all its weights on every rank, to generate with or to measure. After writing to fragments call
    `fragments_changed()`; `saves` says whether this rank's fragments belong into a checkpoint or are copies of
    another's.
    """

    rank: int
    world_size: int
    data_rank: int
    data_ranks: int
    device: torch.device
    model: nn.Module
    step: int

    def train_step(self, micro_batches: Sequence[Batch], loss_fn: LossFunction) -> StepResult: ...

    def evaluate(self, micro_batches: Sequence[Batch], loss_fn: LossFunction) -> EvalResult: ...

    def reduce_sum(self, values: Sequence[float]) -> list[float]: ...

    def sum_over_data(self, values: Sequence[float]) -> list[float]: ...

    def rank_seconds(self) -> list[float]: ...

    def whole(self) -> AbstractContextManager[nn.Module]: ...

    @property
    def saves(self) -> bool: ...

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def fragments(self, kinds: Sequence[str] = KINDS) -> Iterator[Fragment]: ...

    def fragments_changed(self) -> None: ...

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], *, after_rollback: bool = False) -> None: ...
