"""Stopping politely: a signal finishes the step, saves and exits; a second Ctrl-C does not wait.

SIGTERM and Ctrl-C end the run. SIGUSR1 and SIGUSR2, which schedulers send before a time limit or a preemption, say that
it will be started again: a launcher that sees their exit codes requeues the job. (Never on SIGTERM: SLURM's scancel
sends it, and a job that requeues itself then cannot be cancelled.)

Exit codes of a run: 0 finished; 128 + the signal's number where one stopped it and the step was saved (143 SIGTERM, 130
SIGINT, 138 SIGUSR1, 140 SIGUSR2); 2 bad input; 1 anything else.
"""

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

FINISHED = 0
REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
_STOPPING = (signal.SIGTERM, signal.SIGINT, *REQUEUE)


class StopSignals:
    """Context in which the stopping signals set a flag that the training loop reads between steps.

    `requested` is None or the signal. Over several ranks it is what they last agreed on (`agree`, between two steps),
    since a signal reaches them at different moments and some of them not at all. A second SIGINT raises
    KeyboardInterrupt at once; the checkpoints saved before are whole. Handlers that were there before are restored at
    the end. Outside the main thread it sets no handlers (Python forbids it).
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = _STOPPING) -> None:
        self.signals = signals
        self._received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._is_shared = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python and cannot be put back
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        if self._received is None:
            self._received = signal.Signals(number)

    @property
    def requested(self) -> signal.Signals | None:
        """The signal to act on: the ranks' common one as soon as they have talked, else this process's."""
        return self._agreed if self._is_shared else self._received

    def agree(self, sum_over_ranks: Callable[[Sequence[float]], list[float]]) -> bool:
        """Did a signal reach any rank? Then every rank takes it for its own: one exit code for all. Collective."""
        counts = sum_over_ranks([float(number == self._received) for number in self.signals])
        reached = [number for number, count in zip(self.signals, counts) if count > 0]
        self._is_shared, self._agreed = True, reached[0] if reached else None
        return bool(reached)

    @property
    def exit_code(self) -> int:
        """0 if no signal came, else 128 + its number."""
        return FINISHED if self.requested is None else 128 + self.requested

    def message(self, step: int) -> str:
        """What a person reads after the last save."""
        name = self.requested.name if self.requested is not None else "no signal"
        saved = f"Stopped by {name} after step {step}, which is saved."
        if self.requested in REQUEUE:
            return f"{saved} Exit code {self.exit_code} asks for a new start, which goes on from there."
        return f"{saved} Start the same command again to go on from there."
