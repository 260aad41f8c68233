"""SLURM: put this job back into the queue after a preemption signal, and give each task's output a file of its own."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from internlm2.run.ranks import from_environment
from internlm2.run.signals import REQUEUE
from internlm2.run.supervisor import log_file

log = logging.getLogger(__name__)

PATIENCE = 120.0  # seconds for SLURM to end a job that it requeues


def in_step(environment: Mapping[str, str] | None = None) -> bool:
    """Is this one of several tasks of srun?"""
    values = os.environ if environment is None else environment
    return "SLURM_STEP_ID" in values and int(values.get("SLURM_NTASKS", "1")) > 1


def attempt(environment: Mapping[str, str] | None = None) -> int:
    """How often the job was requeued."""
    values = os.environ if environment is None else environment
    return int(values.get("SLURM_RESTART_COUNT", "0"))


def write_to_own_file(logs: Path) -> None:
    """Send the standard output and errors of every rank but the first to `logs`/attempt_<n>/rank_<rank>.log."""
    ranks = from_environment()
    if ranks.is_first:
        return
    folder = logs / f"attempt_{attempt()}"
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log_file(folder, ranks.rank), "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def requeue_if_asked(code: int, environment: Mapping[str, str] | None = None) -> None:
    """After a run that saved on SIGUSR1 or SIGUSR2, let rank 0 requeue the job and wait until SLURM ends this process.

    Elsewhere, after any other end, and where SLURM refuses (a job submitted with --no-requeue), it returns.
    """
    values = os.environ if environment is None else environment
    job = values.get("SLURM_JOB_ID")
    if job is None or code not in [128 + number for number in REQUEUE]:
        return
    if from_environment(values).is_first:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode:
            print(f"SLURM does not requeue job {job}: {done.stderr.strip()}", file=sys.stderr, flush=True)
            return
    time.sleep(PATIENCE)  # a task that ended now would count as failed before the requeue takes effect
