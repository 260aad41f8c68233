"""Show how far tokenizing is: a bar for a person, now and then a line for a log file."""

import logging
import time
from collections.abc import Iterator

from internlm2.data.encoding import EncodedUnit

LOG_SECONDS = 30.0

logger = logging.getLogger(__name__)


def with_bar(units: Iterator[EncodedUnit], title: str, size: int) -> Iterator[EncodedUnit]:
    """Pass `units` on and show a bar of their `size` input bytes on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=size)
        for unit in units:
            bar.advance(task, unit.size)
            yield unit


def with_log(units: Iterator[EncodedUnit], title: str, size: int) -> Iterator[EncodedUnit]:
    """Pass `units` on; log a line at most every `LOG_SECONDS` and one at the end."""
    started = said = time.monotonic()
    done = tokens = 0
    for unit in units:
        done, tokens = done + unit.size, tokens + len(unit.tokens)
        if time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            logger.info("%s: %.1f of %.1f MB, %.1f MB/s", title, done / 1e6, size / 1e6, done / 1e6 / (said - started))
        yield unit
    seconds = max(time.monotonic() - started, 1e-9)
    logger.info("%s: %s tokens of %.1f MB in %.1f s", title, f"{tokens:,}", done / 1e6, seconds)
