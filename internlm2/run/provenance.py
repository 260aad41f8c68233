"""Where a run's numbers come from: versions, machine, source code and its uncommitted changes, each start and how it
ended.
"""

import difflib
import json
import os
import platform
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import internlm2
from internlm2.run.atomic import replace_text
from internlm2.run.directory import RunDirectory

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "hydra-core",
    "omegaconf",
    "deepspeed",
    "flash-attn",
    "peft",
    "pyarrow",
    "wandb",
)
_LARGEST_PATCH = 8 << 20


def record_start(run: RunDirectory, *, step: int, config: str, command: list[str] | None = None) -> dict[str, Any]:
    """Append this start to provenance.json and write config.yaml; returns what was appended.

    `step`: finished steps at this start (0, or that of the checkpoint resumed from). A config that differs from the
    last start's is kept as a diff. Ranks that do not write get {}.
    """
    if not run.writes:
        return {}
    history = read_provenance(run)
    starts = history["starts"]
    entry = {
        "time": _now(),
        "step": step,
        "command": command if command is not None else sys.argv,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "accelerators": _accelerators(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "packages": _versions(),
        "git": git_state(Path(internlm2.__file__).parent, run.path / f"source_{len(starts)}.patch"),
        "config_changes": _config_changes(run, config),
    }
    starts.append(entry)
    replace_text(run.provenance, json.dumps(history, indent=1) + "\n")
    run.write_config(config)
    return entry


def record_end(run: RunDirectory, *, step: int | None, status: str) -> None:
    """Note how the last start ended: `finished`, `stopped` (a signal, saved) or `failed`. A kill leaves no note."""
    history = read_provenance(run)
    if run.writes and history["starts"]:
        history["starts"][-1]["end"] = {"time": _now(), "step": step, "status": status}
        replace_text(run.provenance, json.dumps(history, indent=1) + "\n")


def read_provenance(run: RunDirectory) -> dict[str, Any]:
    """{"starts": [...]}; empty before the first start."""
    if not run.provenance.exists():
        return {"starts": []}
    history: dict[str, Any] = json.loads(run.provenance.read_text())
    return history


def git_state(folder: Path, patch: Path) -> dict[str, Any] | None:
    """Commit of the repository around `folder`, and its uncommitted changes saved as `patch`; None outside a
    repository.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    root = Path((_git(folder, "rev-parse", "--show-toplevel") or str(folder)).strip())
    changes = _git(root, "diff", "HEAD", "--binary") or ""
    untracked = (_git(root, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    state: dict[str, Any] = {"commit": commit.strip(), "dirty": bool(changes or untracked), "patch": None}
    state["untracked"] = untracked[:200]
    if changes and len(changes) <= _LARGEST_PATCH:
        replace_text(patch, changes)
        state["patch"] = patch.name
    return state


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    versions = {"internlm2": internlm2.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _config_changes(run: RunDirectory, config: str) -> list[str]:
    if not run.config.exists():
        return []
    before = run.config.read_text()
    lines = difflib.unified_diff(before.splitlines(), config.splitlines(), "before", "now", lineterm="", n=0)
    return list(lines)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
