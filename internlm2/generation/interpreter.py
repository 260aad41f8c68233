"""Runs a model's Python in a subprocess with limits: time, memory, output, no network where the system allows it.

It is a guard against accidents, not against an attacker: the code runs under the user's own account and can read the
user's files. For untrusted models, run the whole chat inside a container.
"""

import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """seconds of wall time, megabytes of address space, characters of output that are given back."""

    seconds: float = 10.0
    megabytes: int = 1024
    characters: int = 4096


def code_of(block: str) -> str:
    """The code in a Markdown block; text without a fence is taken as code."""
    found = _FENCE.search(block)
    return (found.group(1) if found else block).strip("\n")


@functools.cache
def network_cut() -> tuple[str, ...]:
    """The command that starts a program without network, or () where the system does not let us."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-root-user", "--net")
    tried = subprocess.run([*command, "true"], capture_output=True)
    return command if tried.returncode == 0 else ()


def run_python(code: str, limits: Limits = Limits()) -> str:
    """What the code prints, errors included, followed by a note where it failed or ran into a limit."""
    with tempfile.TemporaryDirectory(prefix="internlm2-interpreter-") as folder:
        output, work = Path(folder) / "output", Path(folder) / "work"
        work.mkdir()
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(work), "TMPDIR": str(work), "LANG": "C.UTF-8"}
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [*network_cut(), sys.executable, "-I", "-u", "-X", "utf8", "-c", code],
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(_limit, limits),
            )
            late = False
            try:
                process.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _end_group(process)
        return _report(output, process.returncode, late, limits)


def _limit(limits: Limits) -> None:
    size = limits.megabytes << 20
    seconds = int(limits.seconds) + 1
    for what, value in (
        (resource.RLIMIT_AS, size),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 64 << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def _end_group(process: subprocess.Popen) -> None:
    """The process and everything it started and left behind in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all gone already
    finally:
        process.wait()


def _report(output: Path, code: int, late: bool, limits: Limits) -> str:
    with output.open("rb") as stream:
        text = stream.read(4 * limits.characters + 4).decode("utf-8", errors="replace")
    notes = []
    if len(text) > limits.characters:
        text = text[: limits.characters]
        notes.append(f"[output cut after {limits.characters} characters]")
    if late:
        notes.append(f"[stopped after {limits.seconds:g} seconds]")
    elif code != 0:
        notes.append(f"[ended with exit code {code}]")
    return "\n".join(part for part in (text.rstrip("\n"), *notes) if part)
