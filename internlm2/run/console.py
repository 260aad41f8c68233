"""What a person sees while a run goes: one line a logged step, a bar below it on a terminal, and the log in a file as
well.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)
PACKAGE = "internlm2"


class _ConsoleHandler(logging.Handler):
    """Log records as plain lines, above a progress bar if there is one; never wrapped, so that they can be searched."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}.get(record.levelno)
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.console.print(prefix + record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def logging_to(path: Path | None, console: Console | None = None, *, enabled: bool = True) -> Iterator[Console]:
    """Send the package's log (logger `internlm2`) to the console and, with times, to the file `path`; yields the
    console.

    `enabled=False` (ranks other than 0) lets only warnings through, and to the console alone.
    """
    console = console or Console(file=sys.stdout)
    logger = logging.getLogger(PACKAGE)
    handlers: list[logging.Handler] = [_ConsoleHandler(console)]
    if path is not None and enabled:
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        handlers.append(file)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO if enabled else logging.WARNING)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield console
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 5 h 12 min, 12 d 3 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    for size, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {name} {seconds % size // smaller} {smaller_name}"
    return ""


def quantity(value: float) -> str:
    """Three digits and a unit: 950, 12.3k, 4.19M, 1.80T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return (
                f"{scaled:.2f}{unit}"
                if scaled < 9.995
                else f"{scaled:.1f}{unit}"
                if scaled < 99.95
                else f"{scaled:.0f}{unit}"
            )
    return f"{value:.0f}"


def step_line(
    step: int,
    total_steps: int,
    *,
    loss: float,
    lr: float,
    grad_norm: float,
    tokens_per_second: float,
    mfu: float | None,
    memory_bytes: int,
    seconds_left: float | None,
    note: str = "",
) -> str:
    """The line of one step: `mfu` 0..1 or None (not shown), `note` what else is worth a word, such as a skipped
    update.
    """
    width = len(str(total_steps))
    parts = [
        f"step {step:>{width}}/{total_steps}",
        f"loss {loss:7.4f}",
        f"lr {lr:.2e}",
        f"norm {grad_norm:6.3f}" if grad_norm < 100 else f"norm {grad_norm:.0e}",
        f"{quantity(tokens_per_second):>5} tok/s",
        *([f"MFU {mfu:5.1%}"] if mfu is not None else []),
        f"{memory_bytes / 2**30:.1f} GiB",
        *([f"{duration(seconds_left)} left"] if seconds_left is not None else []),
        *([note] if note else []),
    ]
    return " | ".join(parts)


class StepProgress:
    """A bar below the log lines on a terminal; nothing elsewhere."""

    def __init__(self, console: Console, title: str, total_steps: int, done: int = 0) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True)
            self._task = self._progress.add_task(title, total=total_steps, completed=done, left="")

    def __enter__(self) -> "StepProgress":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, step: int, seconds_left: float | None) -> None:
        """Show that `step` steps are finished."""
        if self._progress is not None and self._task is not None:
            left = "" if seconds_left is None else f"{duration(seconds_left)} left"
            self._progress.update(self._task, completed=step, left=left)
