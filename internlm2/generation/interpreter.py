"""Runs a model's Python in a subprocess with limits: time, memory, output, and the kernel's guards over files, network
and processes (see `internlm2.generation.sandbox`).

It is a guard against accidents and cheap tricks, not against an attacker of the kernel: for models that you do not
trust, run the whole inside a container.
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

from internlm2.generation import sandbox

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """seconds of wall time, megabytes of address space, characters of output that are given back; `processes`: whether
    the program may start others.
    """

    seconds: float = 10.0
    megabytes: int = 1024
    characters: int = 4096
    processes: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a program printed (errors included, cut at the limit), its exit code, and whether it ran out of time."""

    output: str
    cut: bool
    exit_code: int
    late: bool


def code_of(block: str) -> str:
    """The code in a Markdown block; text without a fence is taken as code."""
    found = _FENCE.search(block)
    return (found.group(1) if found else block).strip("\n")


@functools.cache
def network_cut() -> tuple[str, ...] | None:
    """What must stand before a program's command so that it has no network; None where nothing helps."""
    if "network" not in sandbox.missing():
        return ()
    unshare = shutil.which("unshare")
    if unshare is None:
        return None
    command = (unshare, "--user", "--map-root-user", "--net")
    tried = subprocess.run([*command, "true"], capture_output=True)
    return command if tried.returncode == 0 else None


def run_python(code: str, limits: Limits = Limits()) -> str:
    """What the code prints, errors included, followed by a note where it failed or ran into a limit."""
    found = run_program(code, limits)
    notes = []
    if found.cut:
        notes.append(f"[output cut after {limits.characters} characters]")
    if found.late:
        notes.append(f"[stopped after {limits.seconds:g} seconds]")
    elif found.exit_code != 0:
        notes.append(f"[ended with exit code {found.exit_code}]")
    return "\n".join(part for part in (found.output.rstrip("\n"), *notes) if part)


def run_program(code: str, limits: Limits = Limits()) -> Outcome:
    """Run Python code in a folder of its own, and wait for its end."""
    with tempfile.TemporaryDirectory(prefix="internlm2-interpreter-") as folder:
        output, work = Path(folder) / "output", Path(folder) / "work"
        work.mkdir()
        (work / "program.py").write_text(code, encoding="utf-8", errors="surrogatepass")
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(work), "TMPDIR": str(work), "LANG": "C.UTF-8"}
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [*(network_cut() or ()), sys.executable, "-I", "-u", "-X", "utf8", "program.py"],
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(_limit, limits, str(work)),
            )
            late = False
            try:
                process.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _end_group(process)
        with output.open("rb") as read:
            text = read.read(4 * limits.characters + 4).decode("utf-8", errors="replace")
        cut = len(text) > limits.characters
        return Outcome(text[: limits.characters], cut, process.returncode, late)


def _limit(limits: Limits, work: str) -> None:
    size = limits.megabytes << 20
    seconds = int(limits.seconds) + 1
    for what, value in (
        (resource.RLIMIT_AS, size),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 64 << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))
    if not network_cut():  # unshare itself would be refused, and then it holds the network
        sandbox.lock_down(work, processes=limits.processes)


def _end_group(process: subprocess.Popen) -> None:
    """The process and everything it started and left behind in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all gone already
    finally:
        process.wait()
