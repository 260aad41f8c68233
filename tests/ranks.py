"""Real ranks for tests: processes forked after the imports and joined by gloo, in a fraction of a second.

What a rank returns comes back through a file, so it may hold tensors, numbers, text, lists and dicts.
"""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from internlm2.run.ranks import Ranks


def load_deepspeed() -> None:
    """Import, once before the forks, DeepSpeed and what the first optimizer and the first engine pull in (3 s)."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer
    import torch._dynamo

    assert deepspeed.runtime.zero.muon.muon_optimizer
    assert torch._dynamo


class RankFailed(AssertionError):
    """Some rank ended in another way than by returning; the text has its traceback."""


class Forked:
    """Ranks that are running. `pids` by rank; `wait` collects their exit codes, `results` what they returned."""

    def __init__(self, function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 60.0) -> None:
        load_deepspeed()
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.codes: dict[int, int] = {}
        self.pids: list[int] = []
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _run_rank(function, Ranks(rank, world_size, rank, world_size), self.folder, timeout, arguments)
            self.pids.append(pid)

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit code of each rank, or minus the signal that ended it. Kills what is left after `seconds`."""
        deadline = time.monotonic() + seconds
        while len(self.poll()) < len(self.pids):
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.002)
        return [self.codes[pid] for pid in self.pids]

    def poll(self) -> dict[int, int]:
        """Exit codes, by process, of the ranks that have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return self.codes

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self.pids[rank], number)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to every rank that is still there."""
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def results(self, seconds: float = 120.0) -> list[Any]:
        """What each rank returned, by rank. Raises RankFailed with the tracebacks where one did not."""
        codes = self.wait(seconds)
        if any(codes):
            told = [f"rank {rank}: {file.read_text()}" for rank, file in self._files("error") if file.exists()]
            raise RankFailed(f"exit codes {codes}\n" + "\n".join(told[:3]))
        return [torch.load(file, weights_only=True) for _, file in self._files("pt")]

    def _files(self, suffix: str) -> list[tuple[int, Path]]:
        return [(rank, self.folder / f"{rank}.{suffix}") for rank in range(len(self.pids))]


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = 120.0) -> list[Any]:
    """`function(*arguments)` on each of `world_size` ranks; what they return, by rank."""
    return Forked(function, world_size, *arguments).results(seconds)


def _run_rank(function: Callable[..., Any], ranks: Ranks, folder: Path, timeout: float, arguments: Any) -> None:
    """Never returns, and never reaches the parent's pytest."""
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(ranks.environment())
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(*arguments), folder / f"{ranks.rank}.pt")
        dist.barrier()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        (folder / f"{ranks.rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
