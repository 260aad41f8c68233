"""`engine=single`: one process, plain PyTorch, fp32 master weights and fp32 gradient accumulation."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from internlm2.config.schema import OptimConfig
from internlm2.engine.base import KINDS, Batch, EvalResult, Fragment, LossFunction, StepResult
from internlm2.engine.guard import StepGuard
from internlm2.engine.optimizer import build_adamw, decays
from internlm2.engine.schedule import learning_rate
from internlm2.engine.sums import LossSums

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class SingleEngine:
    """Trains `model` on one device; satisfies `internlm2.engine.base.Engine`.

    The model's parameters become `dtype` ("bf16" or "fp32") on `device`; its buffers keep their dtype. In bf16 each
    trainable parameter has an fp32 master, made from its value before the cast, and a hook adds its bf16 gradient
    into an fp32 one and frees it as soon as backward has produced it. In fp32 the parameters are their own masters
    and autograd accumulates in place: no copies. Between steps no gradient is held. Frozen parameters
    (requires_grad=False) are cast, and are no part of the state.
    """

    rank = data_rank = 0
    world_size = data_ranks = 1
    saves = True

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        total_steps: int,
        device: torch.device | str,
        dtype: str,
        on_nonfinite: str,
        spike_factor: float | None,
        max_bad_steps: int,
    ) -> None:
        self.model = model.to(torch.device(device))
        self.device = torch.device(device)
        self.optim = optim
        self.total_steps = total_steps
        self.step = 0
        self.guard = StepGuard(on_nonfinite, spike_factor, max_bad_steps)
        decaying = decays(model, optim.decay_embeddings)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("The model has no trainable parameter: there is nothing for the engine to do.")
        self._masters = self._cast(DTYPES[dtype])
        self._optimizer = build_adamw(self._masters.items(), decaying, optim)

    def _cast(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Bring the parameters to `dtype`, one by one so that no second model exists; return the fp32 masters by
        name.
        """
        masters: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
                    continue
                master = parameter.data.float().contiguous()
                parameter.data = master.to(dtype)
                masters[name] = parameter if dtype == torch.float32 else master
                if dtype != torch.float32:
                    parameter.register_post_accumulate_grad_hook(_into_fp32(master))
        return masters

    def train_step(self, micro_batches: Sequence[Batch], loss_fn: LossFunction) -> StepResult:
        """Forward and backward over `micro_batches`, then one update of the weights, or none where the guard forbids
        it.

        The denominator is the sum of `loss_tokens` over all micro-batches and ranks, known before the first backward,
        so any split of a batch has the same gradient. The host waits for the device once, before the update.
        """
        announced = self._denominator(micro_batches)
        self.model.train()
        loss, parts = self._accumulate(micro_batches, loss_fn, announced)
        grad_norm = self._grad_norm()
        lr = learning_rate(self.step, self.total_steps, self.optim)
        try:
            verdict, reason = self.guard.judge(self.step, loss, grad_norm)
            if verdict == "applied":
                self._update(lr, grad_norm)
        finally:
            for master in self._masters.values():
                master.grad = None
        self.step += 1
        return StepResult(loss, grad_norm, lr, announced, verdict == "applied", parts, verdict, reason)

    def _denominator(self, micro_batches: Sequence[Batch]) -> int:
        total = int(self.reduce_sum([float(sum(batch.loss_tokens for batch in micro_batches))])[0])
        if total <= 0:
            raise ValueError(
                f"Step {self.step + 1}: none of the {len(micro_batches)} micro-batches has a token with a loss."
            )
        return total

    def _accumulate(
        self, micro_batches: Sequence[Batch], loss_fn: LossFunction, denominator: int
    ) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss over `denominator` tokens; returns that mean and the summed parts."""
        sums = LossSums()
        for batch in micro_batches:
            loss = loss_fn(self.model, batch.to(self.device))
            (loss.sum / denominator).backward()
            sums.add(loss)
        counted, total, parts = sums.read(self.reduce_sum)
        if counted != denominator:
            raise ValueError(
                f"The loss function counted {counted} tokens where the batches announced {denominator} (loss_tokens): "
                "the gradient would be scaled wrongly."
            )
        return total / denominator, parts

    def _grad_norm(self) -> float:
        """L2 norm of the whole fp32 gradient; a parameter that took no part in the step gets a zero gradient."""
        for master in self._masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norms = torch._foreach_norm([m.grad for m in self._masters.values() if m.grad is not None])
        square = torch.stack(norms).double().square().sum().item()
        return math.sqrt(self.reduce_sum([square])[0])

    @torch.no_grad()
    def _update(self, lr: float, grad_norm: float) -> None:
        """Clip to `clip_grad_norm` (0: no clipping), AdamW on the masters, masters into the model."""
        limit = self.optim.clip_grad_norm
        if limit > 0 and grad_norm > limit:
            torch._foreach_mul_([m.grad for m in self._masters.values() if m.grad is not None], limit / grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.fragments_changed()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch], loss_fn: LossFunction) -> EvalResult:
        """Sums of `loss_fn` without gradients, in eval mode; the model returns to the mode that it was in."""
        was_training = self.model.training
        self.model.eval()
        sums = LossSums()
        for batch in micro_batches:
            sums.add(loss_fn(self.model, batch.to(self.device)))
        self.model.train(was_training)
        tokens, total, parts = sums.read(self.reduce_sum)
        return EvalResult(total / tokens if tokens else math.nan, tokens, parts)

    def reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks: here there is one."""
        return list(values)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks with different data: here there is one."""
        return list(values)

    def rank_seconds(self) -> list[float]:
        """Of use with several ranks only: nothing is measured here."""
        return [0.0]

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model itself, which is whole."""
        yield self.model

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of each trainable parameter."""
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def fragments(self, kinds: Sequence[str] = KINDS) -> Iterator[Fragment]:
        """The live state: on one rank each fragment is a whole parameter, from offset 0."""
        for name, master in self._masters.items():
            for kind in kinds:
                tensor = master.detach() if kind == "weight" else self._optimizer.state[master][kind]
                yield Fragment(name, kind, 0, tuple(master.shape), tensor.view(-1))

    @torch.no_grad()
    def fragments_changed(self) -> None:
        """Bring the model's parameters in line with the masters."""
        if any(self._masters[name] is not parameter for name, parameter in self._parameters.items()):
            torch._foreach_copy_(list(self._parameters.values()), [self._masters[name] for name in self._parameters])

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each trainable parameter in full, fp32, as trained (not rounded to bf16)."""
        for name, master in self._masters.items():
            yield name, master.detach()

    def state_dict(self) -> dict[str, Any]:
        """What fragments do not hold; JSON-able. `adam_step` differs from `step` by the steps that were not applied."""
        adam_step = next(iter(self._optimizer.state.values()))["step"].item()
        return {"step": self.step, "adam_step": int(adam_step), "guard": self.guard.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, after_rollback: bool = False) -> None:
        """Restore what `state_dict` gave; the fragments are loaded by a checkpoint reader."""
        self.step = int(state["step"])
        for entry in self._optimizer.state.values():
            entry["step"].fill_(float(state["adam_step"]))
        self.guard.load_state_dict(state["guard"], after_rollback=after_rollback)


def _into_fp32(master: torch.Tensor) -> Any:
    """Hook for a bf16 parameter: its fresh gradient goes into the master's fp32 gradient and is freed."""

    def hook(parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook
