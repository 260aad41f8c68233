"""One stage's directory `runs/<name>/<stage>/`: where everything lies, and who may write to it."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from internlm2.config.errors import ConfigError
from internlm2.run.atomic import replace_text


class RunLocked(ConfigError):
    """Another process is running in this directory."""


class RunDirectory:
    """Paths of one stage's run; creates the directory.

    config.yaml        the composed config
    provenance.json    versions, machine, git state, and each start (source_N.patch: uncommitted changes at start N)
    metrics.jsonl      one record a step: functions of config, seed and data, identical after a resume
    timing.jsonl       one record a step: seconds, tokens/s, MFU, memory
    log.txt            what the console said, with times
    evaluation/        *.json, each a figure of the report
    samples/           *.txt, text that the model wrote
    checkpoints/       step_XXXXXXXX/
    export/            the finished model
    report.html        the page

    `writes`: whether this process may write here; of several ranks only the first does, and for the others every
    method that writes, `lock` included, does nothing. Checkpoints are written by all ranks.
    """

    def __init__(self, path: Path | str, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"{self.path} cannot be a run directory: a file of that name is in the way.") from error
        except OSError as error:
            raise ConfigError(f"The run directory {self.path} cannot be made: {error.strerror}.") from error
        self.config = self.path / "config.yaml"
        self.provenance = self.path / "provenance.json"
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.log = self.path / "log.txt"
        self.report = self.path / "report.html"
        self.evaluation = self.path / "evaluation"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process alone; raises RunLocked, naming the holder, where another one has it.

        An flock on `.lock`: the kernel drops it with the process, whatever ends that, so no stale lock ever needs
        removing. Forked children close their copy at once, or an orphaned worker would keep the directory locked.
        """
        if not self.writes:
            yield
            return
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise RunLocked(
                f"{self.path} is in use by another run ({holder or 'holder unknown'}). "
                "Wait for it, stop it, or choose another name=."
            ) from None
        held = {"descriptor": descriptor}

        def close_in_child() -> None:
            if held:
                os.close(held.pop("descriptor"))

        os.register_at_fork(after_in_child=close_in_child)
        try:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode(), 0)
            yield
        finally:
            held.clear()
            os.close(descriptor)

    def write_config(self, text: str) -> None:
        """Save the composed config (YAML)."""
        if self.writes:
            replace_text(self.config, text)

    def write_json(self, name: str, content: object) -> None:
        """Save `content` as `name` (such as data.json, handover.json, evaluation/by_position.json), whole or not at
        all.
        """
        if not self.writes:
            return
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
