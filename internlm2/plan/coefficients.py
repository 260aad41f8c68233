"""The efficiencies of the time model: what physics leaves open, with the guess and doubt that a fit starts from."""

import json
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

FITTED = Path(__file__).with_name("coefficients.json")


def _open(guess: float, doubt: float) -> Any:
    """A positive number, `guess` before any measurement, uncertain by a factor of about exp(+-doubt)."""
    return field(default=guess, metadata={"doubt": doubt})


@dataclass(frozen=True)
class Coefficients:
    """Seventeen numbers. They are not independent facts about hardware: several fits of equal quality exist."""

    products_a100: float = _open(0.80, 0.10)  # share of peak FLOP/s that large matrix products reach
    products_h100: float = _open(0.65, 0.15)
    attention_a100: float = _open(0.33, 0.20)  # the same for causal FlashAttention, forward, counting half the square
    attention_h100: float = _open(0.22, 0.30)
    small_heads: float = _open(0.90, 0.20)  # attention with heads below 128 dimensions over that with 128
    operands: float = _open(0.50, 0.50)  # share of a matrix product's operand traffic that arithmetic does not hide
    elementwise: float = _open(1.20, 0.30)  # elementwise traffic over that of Network.layer_elements at full bandwidth
    logits: float = _open(7.00, 0.40)  # passes over [tokens, vocabulary] fp32 logits in the loss, forward and backward
    launch: float = _open(100e-6, 0.70)  # seconds a layer and pass that no kernel fills
    recompute: float = _open(0.85, 0.15)  # recomputation over forward: it may stop before a layer's last product
    intra: float = _open(0.70, 0.25)  # share of the link bandwidth inside a node that collectives reach
    inter: float = _open(0.70, 0.25)  # share of a node's network bandwidth that they reach
    hop: float = _open(2e-6, 0.70)  # seconds that a ring collective takes for each rank, however small its message
    exposed_gather: float = _open(0.20, 0.70)  # share of ZeRO-3's traffic that shows even where compute could hide it
    exposed_reduce: float = _open(0.20, 0.70)  # the same for the gradient reduction of ZeRO-1 and 2
    broadcast: float = _open(1e-3, 1.00)  # seconds a rank, where an update is broadcast rank by rank over the network
    step: float = _open(10e-3, 0.70)  # seconds a step: optimizer kernels' launches, norms, logging

    def replaced(self, **values: float) -> "Coefficients":
        return Coefficients(**{**asdict(self), **values})


NAMES = tuple(item.name for item in fields(Coefficients))
DOUBTS = {item.name: float(item.metadata["doubt"]) for item in fields(Coefficients)}


@dataclass(frozen=True)
class Fit:
    """Fitted coefficients, and how far off they were on rows that the fit had not seen (see scripts/fit_plan.py).

    `ppo_factor`: time of a PPO iteration over the sum of its phases, from the published runs.
    """

    coefficients: Coefficients
    ppo_factor: float
    errors: dict[str, Any]


@cache
def fitted() -> Fit:
    """What scripts/fit_plan.py wrote."""
    stored = json.loads(FITTED.read_text(encoding="utf-8"))
    return Fit(Coefficients(**stored["coefficients"]), stored["ppo_factor"], stored["errors"])
