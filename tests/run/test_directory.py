"""The run directory: one owner at a time, whole files, and a record of where the numbers come from."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from internlm2.config import ConfigError
from internlm2.run.directory import RunDirectory, RunLocked
from internlm2.run.provenance import git_state, read_provenance, record_end, record_start

REPOSITORY = Path(__file__).resolve().parents[2]

HOLD = """
import os, sys, time
from internlm2.run.directory import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    if len(sys.argv) > 2 and os.fork() == 0:  # a worker that outlives its parent
        os.close(1)
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    time.sleep(30)
"""


def start_holder(path: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", HOLD, str(path), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("worker", [[], ["worker"]])
def test_second_run_is_refused_and_kill_9_frees_the_directory(tmp_path, worker):
    holder = start_holder(tmp_path, *worker)
    try:
        with pytest.raises(RunLocked, match=rf"in use by another run \(process {holder.pid} on .*another name="):
            RunDirectory(tmp_path).lock().__enter__()
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with RunDirectory(tmp_path).lock():
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    finally:
        os.killpg(holder.pid, signal.SIGKILL) if worker else None
        holder.wait()


def test_lock_is_released_and_can_be_taken_again(tmp_path):
    run = RunDirectory(tmp_path)
    for _ in range(2):
        with run.lock(), pytest.raises(RunLocked):
            RunDirectory(tmp_path).lock().__enter__()
    assert issubclass(RunLocked, ConfigError)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    for path in (tmp_path / "run", tmp_path / "run" / "stage"):
        with pytest.raises(ConfigError, match="a file of that name is in the way"):
            RunDirectory(path)


def test_json_is_replaced_whole(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_json("evaluation/a.json", {"title": "é"})
    with pytest.raises(TypeError):
        run.write_json("evaluation/a.json", {"title": object()})
    assert json.loads((tmp_path / "evaluation" / "a.json").read_text()) == {"title": "é"}
    assert [entry.name for entry in (tmp_path / "evaluation").iterdir()] == ["a.json"]


def test_each_start_and_its_end_are_recorded(tmp_path):
    run = RunDirectory(tmp_path)
    assert read_provenance(run) == {"starts": []}
    record_start(run, step=0, config="seed: 1\nlr: 2\n", command=["train.py"])
    record_end(run, step=7, status="stopped")
    record_start(run, step=7, config="seed: 1\nlr: 3\n", command=["train.py", "lr=3"])
    first, second = read_provenance(run)["starts"]
    assert (first["step"], first["end"]["step"], first["end"]["status"]) == (0, 7, "stopped")
    assert first["config_changes"] == []
    assert [line for line in second["config_changes"] if line[0] in "+-"][2:] == ["-lr: 2", "+lr: 3"]
    assert "end" not in second
    assert second["packages"]["torch"].startswith("2.")
    assert run.config.read_text() == "seed: 1\nlr: 3\n"


def test_git_state_keeps_the_changes_as_a_patch_that_applies(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=source, capture_output=True, text=True, check=True)
        return done.stdout

    source, patch = tmp_path / "source", tmp_path / "run.patch"
    source.mkdir()
    assert git_state(source, patch) is None
    git("init", "-q")
    (source / "a.py").write_text("old\n")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = git_state(source, patch)
    assert clean == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False, "patch": None, "untracked": []}
    assert not patch.exists()

    (source / "a.py").write_text("new\n")
    (source / "b.py").write_text("untracked\n")
    dirty = git_state(source, patch)
    assert (dirty["dirty"], dirty["patch"], dirty["untracked"]) == (True, "run.patch", ["b.py"])
    git("checkout", "a.py")
    git("apply", str(patch))
    assert (source / "a.py").read_text() == "new\n"
