"""Ranks that hold up the others: one slow GPU makes every rank as slow."""

import logging
from collections.abc import Sequence
from statistics import median
from typing import Any

log = logging.getLogger(__name__)

PATIENCE = 5  # steps in a row before a rank is called a straggler: one page fault is none
SILENCE = 100  # steps until it is said again


class Stragglers:
    """Watches each rank's own seconds in a step. `factor`: of the median, from which on a rank counts as slow."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._slow_steps: dict[int, int] = {}
        self._said_at: dict[int, int] = {}

    def observe(self, step: int, seconds: Sequence[float]) -> dict[str, Any]:
        """The step's record for timing.jsonl, {} on one rank; warns of a rank that is slow step after step."""
        if len(seconds) < 2:
            return {}
        usual = median(seconds)
        slow = [rank for rank, own in enumerate(seconds) if own > self.factor * usual]
        self._slow_steps = {rank: self._slow_steps.get(rank, 0) + 1 for rank in slow}
        for rank, steps in self._slow_steps.items():
            if steps >= PATIENCE and step - self._said_at.get(rank, -SILENCE) >= SILENCE:
                self._said_at[rank] = step
                log.warning(
                    "rank %d is a straggler: its forward passes took %.3g s in step %d, the median rank's %.3g s, "
                    "and so for %d steps (engine.straggler_factor=%g)",
                    rank,
                    seconds[rank],
                    step,
                    usual,
                    steps,
                    self.factor,
                )
        slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
        return {
            "rank_seconds": {
                "median": usual,
                "fastest": min(seconds),
                "slowest": seconds[slowest],
                "slowest_rank": slowest,
            }
        }
