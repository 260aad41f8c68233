"""Runs that a real SLURM starts, preempts, requeues and cancels."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 400.0

pytestmark = pytest.mark.slow


def submit(cluster: dict[str, str], output: Path, command: list[str], *options: str) -> str:
    """Submit scripts/train.sbatch with the overrides of `command`; returns the job's number."""
    arguments = command[2:]  # without python and train.py
    script = ["sbatch", "--parsable", f"--output={output}", *options, "scripts/train.sbatch", *arguments]
    done = subprocess.run(script, cwd=REPOSITORY, env=cluster, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split(";")[0]


def state(cluster: dict[str, str], job: str) -> str:
    command = ["scontrol", "show", "job", job, "-o"]
    told = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=60).stdout
    return dict(word.split("=", 1) for word in told.split() if "=" in word).get("JobState", "")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def steps(run: Path) -> list[int]:
    file = run / "pretrain_4k" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


def test_preempted_job_is_requeued_and_ends_as_if_nothing_had_happened(cluster, command, tmp_path):
    """A job in `main` takes the nodes of one in `low`, which saves, waits, and goes on. The judge is a run of the same
    config that our own launcher starts without SLURM.
    """
    overrides = ["engine=zero1", "train.steps=150", "run.log_every=50"]
    output = tmp_path / "output.txt"
    job = submit(cluster, output, command(tmp_path, *overrides, "name=preempted"), "--partition=low", *TWO_NODES)
    run = tmp_path / "preempted"
    wait_until(lambda: len(steps(run)) >= 10, f"no step: {output.read_text() if output.exists() else ''}")
    urgent = ["srun", "--partition=main", "--nodes=2", "--ntasks=2", "--exclusive", "true"]
    assert subprocess.run(urgent, env=cluster, timeout=PATIENCE).returncode == 0
    done_before = len(steps(run))
    assert done_before < 150
    wait_until(lambda: state(cluster, job) == "COMPLETED", f"{state(cluster, job)}: {output.read_text()}")

    told = output.read_text()
    assert "Stopped by SIG" in told
    assert "resumed at step" in told
    assert (run / "logs" / "attempt_0" / "rank_00001.log").exists()
    assert (run / "logs" / "attempt_1" / "rank_00001.log").exists()
    assert steps(run) == list(range(1, 151))
    local = command(tmp_path, *overrides, "name=undisturbed", "launch.ranks=2")
    assert subprocess.run(local, cwd=REPOSITORY, env=cluster, capture_output=True, timeout=PATIENCE).returncode == 0
    metrics = [(tmp_path / name / "pretrain_4k" / "metrics.jsonl").read_text() for name in ("preempted", "undisturbed")]
    assert metrics[0] == metrics[1]


def test_scancel_leaves_a_complete_checkpoint_and_the_job_stays_away(cluster, command, tmp_path):
    output, run = tmp_path / "output.txt", tmp_path / "cancelled"
    overrides = ["engine=zero1", "train.steps=100000", "checkpoint.every=null", "name=cancelled"]
    job = submit(cluster, output, command(tmp_path, *overrides), *TWO_NODES)
    wait_until(lambda: len(steps(run)) >= 5, f"no step: {output.read_text() if output.exists() else ''}")
    subprocess.run(["scancel", job], env=cluster, check=True, timeout=60)
    wait_until(lambda: state(cluster, job) not in ("RUNNING", "COMPLETING"), state(cluster, job))
    time.sleep(3)  # a job that requeued itself would be back in the queue
    assert state(cluster, job) == "CANCELLED"
    saved = sorted((run / "pretrain_4k" / "checkpoints").iterdir())
    assert [entry.name for entry in saved] == [f"step_{steps(run)[-1]:08d}"]
    index = json.loads((saved[0] / "index.json").read_text())
    assert index["world_size"] == 2
    assert {entry.name for entry in saved[0].iterdir()} >= {"index.json", "state.json", *index["files"]}


def test_sweep_of_four_runs_with_two_tasks_each(cluster, command, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep = command(
        tmp_path,
        "hydra/launcher=slurm",
        "hydra.launcher.tasks_per_node=2",
        "engine=zero1",
        "train.steps=4",
        "optim.lr=1e-3,2e-3,3e-3,4e-3",
        "name=sweep",
    )
    sweep.insert(2, "-m")
    done = subprocess.run(sweep, cwd=REPOSITORY, env=cluster, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted((tmp_path / "sweep").iterdir())
    assert len(runs) == 4
    assert all(steps(run) == [1, 2, 3, 4] for run in runs)
    assert all((run / "pretrain_4k" / "finished.json").exists() for run in runs)
    rates = {json.loads((run / "pretrain_4k" / "metrics.jsonl").read_text().splitlines()[1])["lr"] for run in runs}
    assert len(rates) == 4
    for run in runs:
        index = next((run / "pretrain_4k" / "checkpoints").glob("step_*/index.json"))
        assert json.loads(index.read_text())["world_size"] == 2
