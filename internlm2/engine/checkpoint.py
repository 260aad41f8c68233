"""Writing checkpoints: complete or invisible, from a thread, deleting old ones only after success."""

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch

from internlm2.engine.base import Engine
from internlm2.engine.checkpoint_format import (
    FORMAT,
    INDEX,
    STATE,
    CheckpointError,
    fragment_key,
    list_checkpoints,
    rank_file,
    step_directory,
    sync_directory,
    write_fragments,
    write_json,
)

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves an engine's fragments below `directory`; every rank has one writer and calls `save` at the same steps.

    `save` copies the fragments to the host and returns; a thread writes them into a hidden sibling directory, fsyncs
    and hashes. When every rank's file is complete, rank 0's thread writes the index, renames the directory to
    `step_XXXXXXXX`, and only then deletes what `keep_last` and `keep_every` no longer keep. The thread uses no
    collective: ranks see each other's completion through the shared file system. What goes wrong in the thread is
    raised by the next `save` or `wait`.

    Rank 0's writer is constructed before any rank saves: it clears what a killed run left behind.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        keep_last: int = 2,
        keep_every: int | None = None,
        asynchronous: bool = True,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.directory = directory
        self.rank, self.world_size = rank, world_size
        self.keep_last, self.keep_every = keep_last, keep_every
        self.asynchronous = asynchronous
        self.timeout_seconds = timeout_seconds
        self.protected: set[int] = set()  # steps that retention leaves alone, such as the best by validation
        self._attempt = 0
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        directory.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            self._clear_leftovers()

    def save(self, engine: Engine, state: dict[str, Any]) -> None:
        """Save the engine and `state` (JSON-able: position, generators, the stage's own) as the checkpoint of
        `engine.step`.

        Refuses weights or moments that are not finite, on all ranks alike. Raises CheckpointError for that, and for
        whatever went wrong with the save before.
        """
        self._wait_together(engine)
        text = _to_json({**state, "format": FORMAT, "step": engine.step, "engine": engine.state_dict()})
        host: dict[str, torch.Tensor] = {}
        spoilt: list[str] = []
        for fragment in engine.fragments() if engine.saves else ():
            copy = fragment.view.detach().to("cpu", torch.float32, copy=True)
            host[fragment_key(fragment.name, fragment.kind, fragment.offset)] = copy
            if not _is_finite(copy):
                spoilt.append(f"{fragment.kind} of {fragment.name}")
        # Collective, so that no rank writes a checkpoint that another one refuses.
        if engine.reduce_sum([float(len(spoilt))])[0] > 0:
            culprit = spoilt[0] if spoilt else "a tensor of another rank"
            raise CheckpointError(
                f"Step {engine.step} was not saved: {culprit} is not finite. "
                "The checkpoints saved before are untouched."
            )
        self._attempt += 1
        work = (engine.step, self._attempt, host, text, engine.shapes())
        if self.asynchronous:
            self._thread = threading.Thread(target=self._run, args=work, name="checkpoint")
            self._thread.start()
        else:
            self._run(*work)
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way is published (rank 0) or written (others); raise what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _wait_together(self, engine: Engine) -> None:
        """`wait`, after which either every rank goes on or every rank raises."""
        error: CheckpointError | None = None
        try:
            self.wait()
        except CheckpointError as raised:
            error = raised
        failed = engine.reduce_sum([0.0 if error is None else 1.0])[0]
        if error is None and failed:
            error = CheckpointError(
                f"The checkpoint before step {engine.step} was not saved: see the message of another rank."
            )
        if error is not None:
            raise error

    def _run(
        self, step: int, attempt: int, host: dict[str, torch.Tensor], state: str, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        partial = self.directory / f".step_{step:08d}.partial{attempt}"
        started = time.monotonic()
        try:
            self._write(partial, host)
            if self.rank == 0:
                self._publish(partial, step, state, shapes)
                log.info(
                    "saved step %d to %s in %.1f s",
                    step,
                    step_directory(self.directory, step),
                    time.monotonic() - started,
                )
                self._retain(step)
        except Exception as error:  # handed to the next save or wait, on the thread that can act on it
            self._give_up(partial)
            self._error = _explain(error, step, self.directory, sum(4 * t.numel() for t in host.values()))
            if error is not self._error:
                self._error.__cause__ = error

    def _give_up(self, partial: Path) -> None:
        """Free the space of a failed save; a rank other than 0 leaves word, so that rank 0 need not wait for it."""
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            return
        with contextlib.suppress(OSError):
            (partial / rank_file(self.rank)).unlink(missing_ok=True)
            (partial / f"{rank_file(self.rank)}.failed").touch()

    def _write(self, partial: Path, host: dict[str, torch.Tensor]) -> None:
        """This rank's fragments, then the note that they are complete."""
        partial.mkdir(exist_ok=True)
        file = rank_file(self.rank)
        entry = write_fragments(partial / file, host)
        unfinished = partial / f".{file}.json"
        write_json(unfinished, json.dumps(entry))
        os.rename(unfinished, partial / f"{file}.json")

    def _publish(self, partial: Path, step: int, state: str, shapes: dict[str, tuple[int, ...]]) -> None:
        files = {STATE: write_json(partial / STATE, state)} | self._gather(partial, step)
        index = {
            "format": FORMAT,
            "world_size": self.world_size,
            "parameters": {name: list(shape) for name, shape in shapes.items()},
            "files": files,
        }
        write_json(partial / INDEX, json.dumps(index, indent=1))
        sync_directory(partial)
        final = step_directory(self.directory, step)
        replaced = self.directory / f".{final.name}.replaced"
        if final.exists():  # a step saved again: after a rollback, or where the old one could not be read
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        try:
            os.rename(partial, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        sync_directory(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def _gather(self, partial: Path, step: int) -> dict[str, Any]:
        """Wait for the notes of all ranks; {file: {"bytes", "sha256"}}."""
        files: dict[str, Any] = {}
        deadline = time.monotonic() + self.timeout_seconds
        pending = {rank_file(rank) for rank in range(self.world_size)}
        while True:
            for file in sorted(pending):
                note = partial / f"{file}.json"
                if note.exists():
                    files[file] = json.loads(note.read_text())
                    note.unlink()
                if (partial / f"{file}.failed").exists():
                    raise CheckpointError(f"Step {step} was not saved: the rank of {file} could not write its part.")
            pending -= files.keys()
            if not pending:
                return files
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"Step {step} was not saved: after {self.timeout_seconds:.0f} s {len(pending)} of "
                    f"{self.world_size} ranks had not written their part "
                    f"(first: {min(pending)}). Is {self.directory} shared by all nodes?"
                )
            time.sleep(0.02)

    def _retain(self, step: int) -> None:
        """Delete what need not stay. Only steps up to this one count: a later one is the rest of an abandoned
        attempt.
        """
        steps = [old for old, _ in list_checkpoints(self.directory) if old <= step]
        for old in steps[: -self.keep_last]:
            if old in self.protected or (self.keep_every and old % self.keep_every == 0):
                continue
            doomed = self.directory / f".step_{old:08d}.deleting"
            try:
                os.rename(step_directory(self.directory, old), doomed)
                shutil.rmtree(doomed)
            except OSError as error:  # the new checkpoint is there; only space is lost
                log.warning("could not delete the old checkpoint of step %d: %s", old, error)

    def _clear_leftovers(self) -> None:
        """Remove what a killed run was writing or deleting; put back a checkpoint that it was about to replace."""
        for entry in self.directory.glob(".step_*"):
            original = self.directory / entry.name[1:].removesuffix(".replaced")
            if entry.name.endswith(".replaced") and not original.exists():
                os.rename(entry, original)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def _is_finite(tensor: torch.Tensor) -> bool:
    """NaN and infinity show in the norm, the cheapest pass; one that merely overflowed is looked at again."""
    if tensor.numel() == 0 or bool(torch.isfinite(tensor.norm())):
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _to_json(state: dict[str, Any]) -> str:
    try:
        return json.dumps(state, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The state for the checkpoint cannot be written as JSON: {error}.") from error


def _explain(error: Exception, step: int, directory: Path, size: int) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(directory).free
        return CheckpointError(
            f"Step {step} was not saved: the disk of {directory} is full ({size / 2**20:,.1f} MiB needed, "
            f"{free / 2**20:,.1f} MiB free). Free space or lower checkpoint.keep_last, then start the run again; "
            "the checkpoints saved before are untouched."
        )
    return CheckpointError(
        f"Step {step} was not saved to {directory}: {error}. The checkpoints saved before are untouched."
    )
