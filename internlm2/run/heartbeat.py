"""How far is every rank? What a hanging run leaves for its owner: stacks of all threads, and who is behind.

A rank that waits in a collective cannot say for whom. So each counts its own progress, in a file that the others can
read; when one has made none for too long it writes its stacks, compares the counts and ends itself with the names of
those that are behind.
"""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from internlm2.run.atomic import replace_text

log = logging.getLogger(__name__)

HUNG = 1  # exit code: a failure as any other, so that the launcher ends the other ranks and starts again
NAMED = 5  # ranks that a message lists


class Heartbeat:
    """One rank's progress below `directory`/progress, and its watchdog; a context manager around the training loop.

    `beat(where)` after each piece of work that may wait for others: a step, a validation, a save. Without a beat for
    `hang_seconds` (None: never) the stacks of all threads go to `directory`/hangs/rank_00003.txt and the process ends.
    A thread writes the counts, at most every `interval` seconds, so that a beat costs nothing.
    """

    def __init__(self, directory: Path, rank: int, world_size: int, hang_seconds: float | None) -> None:
        self.directory, self.rank, self.world_size = directory, rank, world_size
        self.hang_seconds = hang_seconds
        self.interval = 2.0 if hang_seconds is None else min(2.0, hang_seconds / 4)
        self.count, self.where, self._last = 0, "start", time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self.world_size > 1 or self.hang_seconds is not None:
            for folder in ("progress", "hangs"):
                (self.directory / folder).mkdir(exist_ok=True)
            self.beat("start")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if error is not None and self.world_size > 1:
            self._write()
            log.error("rank %d failed in %s; %s", self.rank, self.where, self.who_is_behind())

    def beat(self, where: str) -> None:
        """Progress: `where` says what was finished, such as "step 17"."""
        self.count, self.where, self._last = self.count + 1, where, time.monotonic()

    def who_is_behind(self) -> str:
        """A sentence about the ranks that have made the least progress, as far as the files say."""
        known = dict(self._read())
        silent = [rank for rank in range(self.world_size) if rank not in known]
        if silent:
            return f"never heard of {_listed(silent)}"
        least = min(record["count"] for record in known.values())
        behind = [rank for rank, record in sorted(known.items()) if record["count"] == least]
        if len(behind) == len(known):
            return "all ranks are equally far"
        record = known[behind[0]]
        return f"behind the others: {_listed(behind)}, last seen after {record['where']} on {record['host']}"

    def _watch(self) -> None:
        written = -1
        while not self._stop.wait(self.interval):
            if self.count != written:
                written = self.count
                self._write()
            if self.hang_seconds is not None and time.monotonic() - self._last > self.hang_seconds:
                self._give_up()

    def _give_up(self) -> None:
        """Stacks, then a moment for the other ranks' files, then the end of this process."""
        stacks = self.directory / "hangs" / f"rank_{self.rank:05d}.txt"
        with open(stacks, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self._write()
        time.sleep(2 * self.interval)
        message = (
            f"rank {self.rank} has made no progress for {self.hang_seconds:g} s after {self.where} "
            f"(engine.hang_seconds); {self.who_is_behind()}"
        )
        with open(stacks, "a", encoding="utf-8") as file:
            file.write(f"\n{message}\n")
        log.error("%s. Stacks of its threads: %s", message, stacks)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(HUNG)

    def _write(self) -> None:
        record = {"count": self.count, "where": self.where, "host": os.uname().nodename, "pid": os.getpid()}
        try:
            replace_text(self.directory / "progress" / f"rank_{self.rank:05d}.json", json.dumps(record) + "\n")
        except OSError as error:  # a full disk is reported by what needs it
            log.debug("progress not written: %s", error)

    def _read(self) -> Iterator[tuple[int, dict]]:
        for rank in range(self.world_size):
            file = self.directory / "progress" / f"rank_{rank:05d}.json"
            if file.exists():
                yield rank, json.loads(file.read_text(encoding="utf-8"))


def _listed(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:NAMED]))
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"
