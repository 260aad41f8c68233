"""`engine=zero1|zero2|zero3`: many ranks, on DeepSpeed. The same numbers as `engine=single`, up to round-off.

Who does what: DeepSpeed shards state, gathers weights and reduces gradients. The loss's denominator, the learning rate,
the verdict over a step, sequence parallelism and checkpoints are ours, so that they are one thing under every engine.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from internlm2.config.schema import EngineConfig, OptimConfig
from internlm2.engine import process_group
from internlm2.engine.base import KINDS, Batch, EvalResult, Fragment, LossFunction, LossSum, StepResult
from internlm2.engine.deepspeed_settings import STAGES, import_deepspeed, settings
from internlm2.engine.guard import StepGuard, TrainingStopped
from internlm2.engine.optimizer import decays
from internlm2.engine.partitions import Partitions
from internlm2.engine.room import make_room
from internlm2.engine.schedule import learning_rate
from internlm2.engine.shard_group import ShardGroup
from internlm2.engine.single import DTYPES
from internlm2.engine.stopwatch import Stopwatch
from internlm2.engine.sums import LossSums
from internlm2.engine.whole import gathered
from internlm2.model.sequence_parallel import SequenceParallel
from internlm2.model.values import Values


class ZeroEngine:
    """Trains `model` on all ranks of the process group; satisfies `internlm2.engine.base.Engine`.

    The model has the same weights on every rank, in fp32 and in host memory or on `device`: the fp32 masters are cut
    from them before DeepSpeed casts. Or it has none ("meta"), and `values` gives pieces of them: then each rank asks
    for the masters that it owns, the others send the rest of the weights, and nobody holds a model in fp32.

    Every rank calls train_step, evaluate, fragments_changed, full_weights and whole at the same time. Ranks may have
    different numbers of micro-batches: who has fewer walks one again with weight zero, since every forward and backward
    pass is collective.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        total_steps: int,
        device: torch.device,
        values: Values | None = None,
    ) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("The model has no trainable parameter: there is nothing for the engine to do.")
        ranks = process_group.join(device, engine.collective_seconds)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_ranks = self.world_size // engine.sequence_parallel
        self.data_rank = self.rank // engine.sequence_parallel
        self.device, self.optim, self.total_steps = device, optim, total_steps
        self.model, self.stage, self.step = model, STAGES[engine.name], 0
        self.guard = StepGuard(engine.on_nonfinite, engine.spike_factor, engine.max_bad_steps)
        self._stopwatch = Stopwatch(device, waits=self.stage == 3 or engine.sequence_parallel > 1)
        self._shapes = {name: tuple(p.shape) for name, p in trained.items()}
        decaying = decays(model, optim.decay_embeddings)
        self._sequence = _join_sequence(model, engine.sequence_parallel)
        self._shard = self._shard_group(engine)
        self._gate = _Gate()
        self._spare: Any = None
        deepspeed = import_deepspeed(device, ranks)
        written = settings(engine, sum(map(math.prod, self._shapes.values())), device, optim.clip_grad_norm)
        if values is None:
            values = _pieces_of({name: p.detach() for name, p in trained.items()})
        else:
            make_room(model, deepspeed, written, DTYPES[engine.dtype], device)
            trained = dict(model.named_parameters())
        self._deepspeed = self._start(deepspeed, written, trained, decaying)
        names = {id(p): name for name, p in model.named_parameters()}
        self._partitions = Partitions(self._deepspeed.optimizer, self.stage, names, self._shapes)
        for fragment in self.fragments(("weight",)):
            end = fragment.offset + fragment.view.numel()
            fragment.view.copy_(values(fragment.name, fragment.offset, end))
        self.fragments_changed()

    def _shard_group(self, engine: EngineConfig) -> ShardGroup | None:
        size = engine.zero.shard_group
        return None if size is None or size == self.world_size or self.stage == 3 else ShardGroup(size)

    def _start(
        self,
        deepspeed: Any,
        written: dict[str, Any],
        trained: dict[str, nn.Parameter],
        decaying: dict[str, bool],
    ) -> Any:
        groups = [
            {
                "params": [p for name, p in trained.items() if decaying[name] is decay],
                "weight_decay": self.optim.weight_decay if decay else 0.0,
            }
            for decay in (True, False)
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.optim.lr,
            betas=(self.optim.beta1, self.optim.beta2),
            eps=self.optim.eps,
            fused=self.device.type in ("cpu", "cuda"),
        )
        update = optimizer.step
        # DeepSpeed knows the gradient's norm only on its way to the optimizer, which therefore asks before it updates.
        optimizer.step = lambda closure=None: update() if self._gate() else None  # type: ignore[method-assign]
        deepspeed.utils.groups.mpu = None  # that of another engine in this process would otherwise stay
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory that it takes
            started = deepspeed.initialize(
                model=_Objective(self.model),
                optimizer=optimizer,
                config=written,
                mpu=self._shard,
            )[0]
        started.optimizer.mpu = None  # it has no model-parallel ranks to ask
        return started

    def train_step(self, micro_batches: Sequence[Batch], loss_fn: LossFunction) -> StepResult:
        """Forward and backward over this rank's `micro_batches`, then one update of the weights, or none where the
        guard forbids it. The denominator is the sum of `loss_tokens` over all micro-batches and ranks.
        """
        announced = int(self.sum_over_data([float(sum(batch.loss_tokens for batch in micro_batches))])[0])
        if announced <= 0:
            raise ValueError(f"Step {self.step + 1}: no rank has a micro-batch with a token that has a loss.")
        self._deepspeed.train()
        loss, parts = self._accumulate(micro_batches, loss_fn, announced)
        lr = learning_rate(self.step, self.total_steps, self.optim)
        grad_norm, verdict, reason = self._update(loss, lr)
        self.step += 1
        return StepResult(loss, grad_norm, lr, announced, verdict == "applied", parts, verdict, reason)

    def _accumulate(
        self, micro_batches: Sequence[Batch], loss_fn: LossFunction, denominator: int
    ) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss over `denominator` tokens; returns that mean and the summed parts."""
        sums = LossSums()
        # DeepSpeed divides the ranks' sum by their number; what is left of it is undone here.
        averaged_over = self._shard.size if self._shard is not None else self.world_size
        work = self._evened(micro_batches)
        for number, (batch, counts) in enumerate(work):
            self._deepspeed.set_gradient_accumulation_boundary(number == len(work) - 1)
            with self._stopwatch:
                loss = self._forward(batch, loss_fn, sums, counts, averaged_over / denominator)
            self._deepspeed.backward(loss, scale_wrt_gas=False)
        if self._shard is not None:
            self._partitions.add_up_gradients(self._shard.across)
        counted, total, parts = sums.read(self.sum_over_data)
        if counted != denominator:
            raise ValueError(
                f"The loss function counted {counted} tokens where the batches announced {denominator} (loss_tokens): "
                "the gradient would be scaled wrongly."
            )
        return total / denominator, parts

    def _forward(
        self, batch: Batch, loss_fn: LossFunction, sums: LossSums, counts: bool, scale: float = 1.0
    ) -> torch.Tensor:
        """One pass through DeepSpeed's forward, whose hooks gather weights; the loss is added to `sums`."""

        def weighted(model: nn.Module) -> torch.Tensor:
            loss = loss_fn(model, batch.to(self.device))
            if not counts:
                loss = LossSum(loss.sum * 0.0, 0, {key: part * 0.0 for key, part in loss.parts.items()})
            sums.add(loss)
            return loss.sum * scale

        return self._deepspeed(weighted)

    def _evened(self, batches: Sequence[Batch]) -> list[tuple[Any, bool]]:
        """(batch, whether it counts), equally many on every rank."""
        most = int(max(process_group.gather_over_ranks(float(len(batches)))))
        if batches:
            self._spare = batches[-1]
        elif most and self._spare is None:
            raise ValueError(
                f"Rank {self.rank} has no batch where others have {most}: give at least as many rows as ranks."
            )
        return [(batch, True) for batch in batches] + [(self._spare, False)] * (most - len(batches))

    def _update(self, loss: float, lr: float) -> tuple[float, str, str]:
        """Let DeepSpeed clip and update, if the guard agrees; (gradient norm, verdict, reason)."""
        optimizer, found = self._deepspeed.optimizer, list[tuple[float, str, str]]()
        stopped: list[TrainingStopped] = []

        def judge(norm: float) -> bool:
            try:
                found.append((norm, *self.guard.judge(self.step, loss, norm)))
            except TrainingStopped as error:  # the step is left in order before it is raised
                stopped.append(error)
            return bool(found) and found[0][1] == "applied"

        for group in optimizer.param_groups:
            group["lr"] = lr
        self._gate.open_for(lambda: judge(float(optimizer._global_grad_norm)))
        self._deepspeed.step()
        if not self._gate.asked:  # DeepSpeed itself found the gradient not finite and dropped the step
            judge(math.inf)
        if stopped:
            raise stopped[0]
        return found[0]

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch], loss_fn: LossFunction) -> EvalResult:
        """Sums of `loss_fn` without gradients, in eval mode; the model returns to the mode that it was in."""
        was_training = self.model.training
        self._deepspeed.eval()
        sums = LossSums()
        for batch, counts in self._evened(micro_batches):
            self._forward(batch, loss_fn, sums, counts)
        self._deepspeed.train(was_training)
        tokens, total, parts = sums.read(self.sum_over_data)
        return EvalResult(total / tokens if tokens else math.nan, tokens, parts)

    def reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks."""
        return process_group.sum_over_ranks(values)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks with different data: those that share a row hold equal values."""
        copies = self.world_size // self.data_ranks
        return [value / copies for value in process_group.sum_over_ranks(values)]

    def rank_seconds(self) -> list[float]:
        """Each rank's seconds in the forward passes of the last step."""
        return process_group.gather_over_ranks(self._stopwatch.take())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of each trainable parameter."""
        return dict(self._shapes)

    @property
    def saves(self) -> bool:
        """With several copies of the sharded state (engine.zero.shard_group), the first is the one to save."""
        return self._shard is None or self._shard.copy == 0

    def fragments(self, kinds: Sequence[str] = KINDS) -> Iterator[Fragment]:
        """The pieces of the live state that this rank owns."""
        return self._partitions.fragments(kinds)

    def fragments_changed(self) -> None:
        """Bring the model's weights, on all ranks, in line with the fp32 masters."""
        self._partitions.spread()

    @torch.no_grad()
    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each trainable parameter in full, fp32, as trained, on the host and on every rank; one at a time."""
        mine: dict[str, list[Fragment]] = {}
        for fragment in self.fragments(("weight",)) if self.saves else ():
            mine.setdefault(fragment.name, []).append(fragment)
        for name, shape in self._shapes.items():
            whole = torch.zeros(shape, dtype=torch.float32)
            for fragment in mine.get(name, ()):
                whole.view(-1)[fragment.offset : fragment.offset + fragment.view.numel()] = fragment.view.cpu()
            dist.all_reduce(whole)
            yield name, whole

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model as a plain module with all its weights, without hooks and sequence parallelism: to generate with,
        or to measure, on each rank by itself. Weights must not be changed inside.
        """
        with _alone(self.model), gathered(self._deepspeed, self.stage):
            yield self.model

    def state_dict(self) -> dict[str, Any]:
        """What fragments do not hold; JSON-able, and the same on every rank and engine."""
        adam_step = int(self._partitions.states[0]["step"].item())
        return {"step": self.step, "adam_step": adam_step, "guard": self.guard.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, after_rollback: bool = False) -> None:
        """Restore what `state_dict` gave; the fragments are loaded by a checkpoint reader."""
        self.step = int(state["step"])
        for entry in self._partitions.states:
            entry["step"].fill_(float(state["adam_step"]))
        self.guard.load_state_dict(state["guard"], after_rollback=after_rollback)


def _pieces_of(tensors: dict[str, torch.Tensor]) -> Values:
    return lambda name, start, stop: tensors[name].reshape(-1)[start:stop]


class _Objective(nn.Module):
    """The loss function as a module's forward: DeepSpeed gathers whatever a loss function reads of the model, its own
    methods and tied weights included.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[[nn.Module], torch.Tensor]) -> torch.Tensor:
        return loss(self.model)


class _Gate:
    """One verdict a step, whichever of the optimizer's groups asks first."""

    def __init__(self) -> None:
        self._judge: Callable[[], bool] = lambda: True
        self._verdict: bool | None = None

    def open_for(self, judge: Callable[[], bool]) -> None:
        self._judge, self._verdict = judge, None

    @property
    def asked(self) -> bool:
        return self._verdict is not None

    def __call__(self) -> bool:
        if self._verdict is None:
            self._verdict = self._judge()
        return self._verdict


def _join_sequence(model: nn.Module, degree: int) -> SequenceParallel | None:
    """Put the ranks into groups of `degree` neighbours that share a row; collective."""
    if degree == 1:
        return None
    mine = None
    for start in range(0, dist.get_world_size(), degree):
        group = dist.new_group(list(range(start, start + degree)))
        if start <= dist.get_rank() < start + degree:
            mine = SequenceParallel(group)
    for module in model.modules():
        if hasattr(module, "sequence_parallel"):
            module.sequence_parallel = mine  # type: ignore[assignment]
    return mine


@contextlib.contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Without sequence parallelism for a while."""
    modules = [m for m in model.modules() if getattr(m, "sequence_parallel", None) is not None]
    kept = [m.sequence_parallel for m in modules]
    for module in modules:
        module.sequence_parallel = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, ranks in zip(modules, kept):
            module.sequence_parallel = ranks
