"""Seconds of a rank's own work, as far as they can be told from waiting for others."""

import time
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the blocks that it surrounds: GPU time between events on a GPU, else seconds of the clock.

    `waits`: the blocks contain collectives (ZeRO 3, sequence parallelism). On the CPU the thread's own processor time
    is then taken, in which waiting does not count; on a GPU every rank's time contains the slowest one's, so that a
    straggler shows only as far as it delays the others in no collective.
    """

    def __init__(self, device: torch.device, waits: bool) -> None:
        self._cuda = device.type == "cuda"
        self._now = time.thread_time if waits else time.perf_counter
        self._seconds, self._begin = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        self._begin = self._now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds += self._now() - self._begin
        if self._cuda:
            self._events[-1][1].record()

    def take(self) -> float:
        """The sum since the last call. The device has to be idle, as it is at the end of a step."""
        seconds = sum(begin.elapsed_time(end) / 1e3 for begin, end in self._events) if self._cuda else self._seconds
        self._seconds = 0.0
        self._events.clear()
        return seconds
