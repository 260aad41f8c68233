"""Stopping politely: SIGTERM or Ctrl-C finishes the step, saves and exits; a second Ctrl-C does not wait.

Exit codes of a run: 0 finished; 143 (128 + SIGTERM) or 130 (128 + SIGINT) stopped by that signal and saved, so that a
scheduler sees that it did not finish; 1 anything else.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

FINISHED = 0
_STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context in which the stopping signals set a flag that the training loop reads between steps.

    `requested` is None or the signal. Over several ranks the flag is summed before anybody acts on it
    (engine.reduce_sum), since a signal reaches them at different steps. A second SIGINT raises KeyboardInterrupt at
    once; the checkpoints saved before are whole. Handlers that were there before are restored at the end. Outside the
    main thread it sets no handlers (Python forbids it).
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = _STOPPING) -> None:
        self.signals = signals
        self.requested: signal.Signals | None = None
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
        if number == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """0 if no signal came, else 128 + its number."""
        return FINISHED if self.requested is None else 128 + self.requested

    def message(self, step: int) -> str:
        """What a person reads after the last save."""
        name = self.requested.name if self.requested is not None else "no signal"
        return f"Stopped by {name} after step {step}, which is saved. Start the same command again to go on from there."
