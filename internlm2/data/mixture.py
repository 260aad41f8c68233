"""Which pool a position draws from: a periodic table in which each pool's turns are spread evenly."""

import heapq
from collections.abc import Sequence

import numpy as np

# Turns in one period. A share is rounded to a multiple of one turn, but never to none.
PERIOD = 1 << 15


class SlotTable:
    """Maps a position to (pool, how many earlier positions drew from that pool) in O(1).

    In every prefix of a period each pool has its exact share of turns to less than one turn (earliest deadline first on
    unit jobs with release floor(j / share) and deadline ceil((j + 1) / share), which is feasible because the shares sum
    to one).
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.turns = _apportion(np.asarray(shares, dtype=np.float64))
        self.period = int(self.turns.sum())
        self._pools = _spread([int(turns) for turns in self.turns])
        self._ranks = np.empty(self.period, np.int64)
        for pool, turns in enumerate(self.turns):
            self._ranks[self._pools == pool] = np.arange(turns)

    def locate(self, position: int) -> tuple[int, int]:
        """Pool of a position, and the number of earlier positions of that pool."""
        periods, slot = divmod(position, self.period)
        pool = int(self._pools[slot])
        return pool, periods * int(self.turns[pool]) + int(self._ranks[slot])

    def counts(self, positions: int) -> np.ndarray:
        """[pools] int64: how many of the first `positions` positions draw from each pool."""
        periods, rest = divmod(positions, self.period)
        return periods * self.turns + np.bincount(self._pools[:rest], minlength=len(self.turns))


def _apportion(shares: np.ndarray) -> np.ndarray:
    """Whole turns proportional to `shares` by largest remainders, at least one each, divided by their common
    divisor.
    """
    exact = shares / shares.sum() * PERIOD
    turns = np.maximum(np.floor(exact).astype(np.int64), 1)
    missing = PERIOD - int(turns.sum())
    if missing > 0:
        turns[np.argsort(turns - exact, kind="stable")[:missing]] += 1
    return turns // np.gcd.reduce(turns)


def _spread(turns: list[int]) -> np.ndarray:
    period = sum(turns)
    done = [0] * len(turns)
    waiting = [(0, pool) for pool in range(len(turns))]  # (release, pool)
    ready: list[tuple[int, int]] = []  # (deadline, pool)
    pools = np.empty(period, np.int32)
    heapq.heapify(waiting)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, pool = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(done[pool] + 1) * period // turns[pool]), pool))
        _, pool = heapq.heappop(ready)
        pools[slot] = pool
        done[pool] += 1
        if done[pool] < turns[pool]:
            heapq.heappush(waiting, (done[pool] * period // turns[pool], pool))
    return pools
