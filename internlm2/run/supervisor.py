"""Start the ranks of one machine as processes, watch them, and end them together. No torch.

torch's elastic agent would kill ranks 30 s after it was told to stop, however long their last save takes, and takes the
exit codes of an orderly stop for failures; what remains of it here is a loop over processes.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from internlm2.run.ranks import Ranks

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# Exit codes with which a rank ends in order: finished, or stopped by a signal and saved. The others end soon after.
ORDERLY = (0, *(128 + number for number in FORWARDED))
BAD_INPUT = 2  # bad config or data: no restart would mend it
SUPERVISED = "INTERNLM2_SUPERVISED"  # in the environment of ranks that have this launcher above them
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code, and, where a rank died, which one, how, and where its log is."""

    code: int
    culprit: int | None = None
    how: str = ""
    log: Path | None = None

    @property
    def failed(self) -> bool:
        """Did a rank die, so that a restart may help?"""
        return self.culprit is not None

    def message(self) -> str:
        """Who ended the job, in one sentence."""
        place = f" Its log: {self.log}" if self.log is not None else ""
        return f"rank {self.culprit} on {socket.gethostname()} {self.how}, which ended the job.{place}"


def run_ranks(
    command: Sequence[str],
    ranks: int,
    logs: Path,
    *,
    grace_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run `command` as `ranks` processes and wait for the end of all.

    Rank 0 shares this terminal, the others write `logs`/rank_00001.log and so on. SIGTERM, SIGINT, SIGUSR1 and SIGUSR2
    go to every rank, which saves and exits in its own time. Where a rank dies, the others get `grace_seconds` to end by
    themselves (their collectives fail), then SIGKILL. Should this process be killed, the ranks get SIGTERM.
    """
    logs.mkdir(parents=True, exist_ok=True)
    base = {**(os.environ if environment is None else environment), **_rendezvous(ranks), SUPERVISED: "1"}
    base.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    processes: list[subprocess.Popen[bytes]] = []
    previous = _forward_signals(processes)
    try:
        for rank in range(ranks):
            processes.append(_start(command, Ranks(rank, ranks, rank, ranks), base, logs))
        return _watch(processes, logs, grace_seconds)
    finally:
        _end(processes, 0.0)
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def log_file(logs: Path, rank: int) -> Path:
    """Where a rank's standard output and errors go; rank 0 has the terminal."""
    return logs / f"rank_{rank:05d}.log"


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _start(command: Sequence[str], ranks: Ranks, environment: Mapping[str, str], logs: Path) -> subprocess.Popen[bytes]:
    options: dict[str, Any] = {}
    if ranks.rank > 0:
        with open(log_file(logs, ranks.rank), "ab") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            return _spawn(command, {**environment, **ranks.environment()}, options)
    return _spawn(command, {**environment, **ranks.environment()}, options)


def _spawn(command: Sequence[str], environment: Mapping[str, str], options: dict[str, Any]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches the ranks once, through this process, and not a second time by the terminal.
    return subprocess.Popen(
        command, env=dict(environment), start_new_session=True, preexec_fn=_die_with_parent, **options
    )


def _die_with_parent() -> None:
    """In the child: SIGTERM when the launcher dies, so that no rank is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _rendezvous(ranks: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


def _forward_signals(processes: list[subprocess.Popen[bytes]]) -> dict[signal.Signals, Any]:
    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    return {number: signal.signal(number, forward) for number in FORWARDED}


def _watch(processes: list[subprocess.Popen[bytes]], logs: Path, grace_seconds: float) -> Outcome:
    """Wait until all have ended in order, or one has not."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code is not None and code not in ORDERLY:
                _end(processes, grace_seconds)
                if code == BAD_INPUT:
                    return Outcome(BAD_INPUT)
                return Outcome(1, rank, _how(code), log_file(logs, rank) if rank else None)
        if None not in codes:
            return Outcome(max(code for code in codes if code is not None))
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen[bytes]], grace_seconds: float) -> None:
    """Wait `grace_seconds` for those that still run, then kill them."""
    deadline = time.monotonic() + grace_seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def _how(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory, or by hand)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
