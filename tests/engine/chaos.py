"""A training run in two ranks that is made to be killed: run by test_chaos.py, which forks its attempts."""

import errno
import json
import os
from pathlib import Path

from rank_training import ROWS, start, step_rows
from tiny_training import cross_entropy, make_rows

from internlm2.config import WandbConfig
from internlm2.engine import checkpoint
from internlm2.engine.checkpoint import CheckpointWriter
from internlm2.engine.checkpoint_format import CheckpointError
from internlm2.engine.checkpoint_reader import restore_newest
from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import Metrics
from internlm2.run.signals import StopSignals

EVERY = 5  # steps between checkpoints


def attempt(path: str, name: str, steps: int, full_disk_at: int | None) -> None:
    """Go on from the newest whole checkpoint to the last step; rank 0 notes each start and each step as it happens.

    `full_disk_at`: the checkpoint of that step finds the disk full under rank 1, once, as does the run's owner.
    """
    engine = start(name)
    run = RunDirectory(path, writes=engine.rank == 0)
    with run.lock(), StopSignals() as stop:
        state, skipped = restore_newest(engine, run.checkpoints)
        metrics = Metrics(run, WandbConfig("disabled", "x"), config={}, enabled=run.writes)
        metrics.truncate_after(engine.step)
        assert state is None or state["position"] == engine.step * ROWS
        note(run, {"start": engine.step, "skipped": skipped})
        writer = CheckpointWriter(run.checkpoints, rank=engine.rank, world_size=engine.world_size)
        while engine.step < steps:
            result = engine.train_step(step_rows(engine, make_rows(ROWS, seed=engine.step)), cross_entropy)
            values = {"loss": result.loss, "grad_norm": result.grad_norm, "position": engine.step * ROWS}
            metrics.record(engine.step, values, {})
            note(run, {"step": engine.step})
            asked = stop.agree(engine.reduce_sum)
            if engine.step % EVERY == 0 or engine.step == steps or asked:
                with disk_full(engine.rank == 1 and engine.step == full_disk_at):
                    writer.save(engine, {"position": engine.step * ROWS})
                    if engine.step == full_disk_at:
                        writer.wait()
            if asked:
                break
        writer.wait()
        metrics.close()


class disk_full:
    """Writing fragments fails as on a full disk; a save that fails ends the attempt."""

    def __init__(self, happens: bool) -> None:
        self.happens, self.write = happens, checkpoint.write_fragments

    def __enter__(self) -> None:
        if self.happens:
            checkpoint.write_fragments = self.fail

    def __exit__(self, kind, error, trace) -> None:
        checkpoint.write_fragments = self.write
        if isinstance(error, CheckpointError):
            os._exit(1)  # what the loop's owner does: an error, exit code 1

    @staticmethod
    def fail(path: Path, tensors) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))


def note(run: RunDirectory, record: dict) -> None:
    """One line in a file that no restart truncates: what really happened."""
    if run.writes:
        with open(run.path / "notes.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
