"""Judges a step before its update: non-finite values and loss spikes, and when a run with too many of them must end."""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

# Losses of accepted steps that the running median looks back on, and how many it needs before it judges at all. A
# median, not a mean: one accepted outlier does not move it.
WINDOW = 64
MINIMUM_HISTORY = 16


class TrainingStopped(RuntimeError):
    """A bad step ended the run: policy `stop`, or more bad steps than `engine.max_bad_steps`. Nothing was updated by
    that step.
    """


@dataclass
class StepGuard:
    """Keeps the recent losses and the count of bad steps.

    It sees only numbers that are already summed over all ranks (loss, gradient norm), so every rank comes to the same
    verdict without a further collective.

    `policy` is what a bad step leads to: `skip` drops its update and goes on; `stop` ends the run; `rollback` asks
    the training loop to return to the newest checkpoint and to pass over the data since then. A bad step is one with
    a non-finite loss or gradient norm, or with a loss above `spike_factor` times the median of the last accepted
    losses (None: spikes are not judged). `max_bad_steps` bad steps without a good one after them end the run under
    any policy.
    """

    policy: str
    spike_factor: float | None
    max_bad_steps: int
    losses: list[float] = field(default_factory=list)
    bad_steps: int = 0
    last_bad_step: int = -1

    def judge(self, step: int, loss: float, grad_norm: float) -> tuple[str, str]:
        """(`applied` | `skipped` | `rollback`, reason) for step `step`; raises TrainingStopped where the run must
        end.
        """
        reason = self._what_is_wrong(loss, grad_norm)
        if not reason:
            # After a rollback the steps before the bad one are walked again: they do not count as recovery.
            if step >= self.last_bad_step:
                self.bad_steps = 0
            self.losses = [*self.losses[1 - WINDOW :], loss]
            return "applied", ""
        self.bad_steps += 1
        self.last_bad_step = max(step, self.last_bad_step)
        if self.policy == "stop":
            raise TrainingStopped(
                f"Step {step + 1} was not applied: {reason}. The run stops here (engine.on_nonfinite=stop); "
                "the newest checkpoint is untouched."
            )
        if self.bad_steps >= self.max_bad_steps:
            raise TrainingStopped(
                f"Step {step + 1} was not applied: {reason}. It is bad step number {self.bad_steps} without recovery "
                f"(engine.max_bad_steps={self.max_bad_steps}): lower optim.lr, or look at the data of these steps."
            )
        return ("rollback" if self.policy == "rollback" else "skipped"), reason

    def _what_is_wrong(self, loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if self.spike_factor is not None and len(self.losses) >= MINIMUM_HISTORY:
            usual = median(self.losses)
            if loss > self.spike_factor * usual > 0:
                return (
                    f"the loss {loss:.4g} is above {self.spike_factor:g} times the median {usual:.4g} "
                    f"of the last {len(self.losses)} accepted steps (engine.spike_factor)"
                )
        return ""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; floats survive JSON exactly."""
        return {"losses": list(self.losses), "bad_steps": self.bad_steps, "last_bad_step": self.last_bad_step}

    def load_state_dict(self, state: dict[str, Any], *, after_rollback: bool = False) -> None:
        """Restore the state; after a rollback the count of bad steps goes on, or the run would roll back for ever."""
        self.losses = [float(loss) for loss in state["losses"]]
        if not after_rollback:
            self.bad_steps, self.last_bad_step = int(state["bad_steps"]), int(state["last_bad_step"])
