"""A run that was interrupted, however roughly, is the run that was not: same records, same weights, bit for bit."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.stages.conftest import REPOSITORY

STAGE = Path("smoke/pretrain_4k")


def records(root: Path) -> list[str]:
    return (root / STAGE / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def weights(root: Path, step: int) -> dict:
    return load_file(root / STAGE / f"checkpoints/step_{step:08d}/rank00000.safetensors")


def interrupt(command: list[str], root: Path, steps: int, number: signal.Signals) -> subprocess.Popen:
    """Start a run and send it a signal once it has recorded `steps` steps."""
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = root / STAGE / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= steps):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    process.wait(timeout=240)
    return process


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """30 steps in one go."""
    root = tmp_path_factory.mktemp("whole")
    subprocess.run(command(root), cwd=REPOSITORY, check=True, capture_output=True)
    return root


def assert_same_run(root: Path, whole: Path) -> None:
    assert records(root) == records(whole)
    resumed, straight = weights(root, 30), weights(whole, 30)
    assert resumed.keys() == straight.keys()
    for name, tensor in straight.items():
        assert resumed[name].tobytes() == tensor.tobytes(), name


def test_kill_and_resume(command, run, whole, tmp_path):
    process = interrupt(command(tmp_path), tmp_path, 13, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(records(tmp_path)) < 30
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    assert_same_run(tmp_path, whole)


def test_sigterm_saves_and_exits(command, run, whole, tmp_path):
    process = interrupt(command(tmp_path), tmp_path, 8, signal.SIGTERM)
    stopped = len(records(tmp_path))
    assert process.returncode == 128 + signal.SIGTERM
    assert f"Stopped by SIGTERM after step {stopped}" in process.communicate()[0]
    assert (tmp_path / STAGE / f"checkpoints/step_{stopped:08d}/index.json").exists()
    assert run(tmp_path).returncode == 0
    assert_same_run(tmp_path, whole)


def test_a_truncated_newest_checkpoint_is_passed_over(command, run, whole, tmp_path):
    interrupt(command(tmp_path, "checkpoint.asynchronous=false"), tmp_path, 11, signal.SIGKILL)
    newest = max((tmp_path / STAGE / "checkpoints").glob("step_*"))
    file = newest / "rank00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Skipped {newest}: rank00000.safetensors is truncated" in done.stdout
    assert_same_run(tmp_path, whole)


def test_a_complete_stage_is_left_alone_and_a_longer_one_goes_on(run, whole):
    before = records(whole)
    done = run(whole)
    assert done.returncode == 0
    assert "pretrain_4k is complete" in done.stdout
    assert records(whole) == before


def test_micro_batches_do_not_change_the_run(run, whole, tmp_path):
    """8 x 1, 2 x 4 ... : the rows of a step and the gradient's denominator do not depend on the split."""
    assert run(tmp_path, "train.micro_batch=1").returncode == 0
    for ours, theirs in zip(records(tmp_path), records(whole), strict=True):
        ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours["loss_tokens"] == theirs["loss_tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=3e-5)
