"""Starting ranks on this machine: environment, logs, who died, restarts, signals. The ranks are small scripts."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from internlm2 import launch
from internlm2.config import ConfigError
from internlm2.config.cluster import LaunchConfig
from internlm2.run.supervisor import log_file, run_ranks

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(tmp_path):
    """`script(code)` is the command of a program whose rank is `rank` of `ranks`, in the folder `tmp_path`."""

    def write(code: str) -> list[str]:
        file = tmp_path / "program.py"
        head = "import json, os, signal, sys, time\nfrom pathlib import Path\n"
        head += "rank, ranks = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"
        head += f"folder = Path({str(tmp_path)!r})\n"
        file.write_text(head + textwrap.dedent(code))
        return [sys.executable, str(file)]

    return write


def settings(max_restarts: int = 0) -> SimpleNamespace:
    return SimpleNamespace(launch=LaunchConfig(ranks=2, max_restarts=max_restarts, grace_seconds=5.0))


def test_each_rank_knows_its_place_and_writes_its_own_log(script, tmp_path):
    command = script(
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        (folder / f"{rank}.json").write_text(json.dumps([os.environ[name] for name in names]))
        print("hello from", rank)
        """
    )
    assert run_ranks(command, 3, tmp_path / "logs", grace_seconds=5.0).code == 0
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [values[:4] for values in seen] == [[str(rank), "3", str(rank), "3"] for rank in range(3)]
    assert len({tuple(values[4:]) for values in seen}) == 1
    assert not log_file(tmp_path / "logs", 0).exists()
    assert [log_file(tmp_path / "logs", rank).read_text() for rank in (1, 2)] == ["hello from 1\n", "hello from 2\n"]


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL (out of memory"),
        ("raise ValueError('rank 1 is ill')", "exit code 1"),
    ],
)
def test_a_dead_rank_is_named_and_ends_the_others(script, tmp_path, end, how):
    command = script(
        f"""
        if rank == 1:
            {end}
        time.sleep(600)
        """
    )
    started = time.monotonic()
    outcome = run_ranks(command, 3, tmp_path / "logs", grace_seconds=0.2)
    assert outcome.failed
    assert outcome.culprit == 1
    assert how in outcome.message()
    assert "rank_00001.log" in outcome.message()
    assert time.monotonic() - started < 60  # the others slept for ten minutes


def test_bad_input_ends_all_without_a_culprit(script, tmp_path):
    command = script("sys.exit(2) if rank == 0 else time.sleep(600)")
    outcome = run_ranks(command, 2, tmp_path / "logs", grace_seconds=0.2)
    assert (outcome.code, outcome.failed) == (2, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank_and_their_exit_codes_are_no_failure(script, tmp_path, number):
    command = script(
        """
        stop = []
        for name in ("SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), lambda number, frame: stop.append(number))
        (folder / f"ready{rank}").touch()
        while not stop:
            time.sleep(0.01)
        time.sleep(0.3 * rank)  # a longer save
        (folder / f"saved{rank}").touch()
        sys.exit(128 + stop[0])
        """
    )
    launcher = (
        "import sys; from pathlib import Path; from internlm2.run.supervisor import run_ranks; "
        f"outcome = run_ranks({command!r}, 2, Path({str(tmp_path)!r}) / 'logs', grace_seconds=0.1); "
        "assert not outcome.failed; sys.exit(outcome.code)"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=REPOSITORY)
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()


def test_ranks_do_not_outlive_a_killed_launcher(script, tmp_path):
    command = script(
        """
        (folder / f"pid{rank}").write_text(str(os.getpid()))
        time.sleep(600)
        """
    )
    launcher = (
        "from pathlib import Path; from internlm2.run.supervisor import run_ranks; "
        f"run_ranks({command!r}, 2, Path({str(tmp_path)!r}) / 'logs', grace_seconds=1.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=REPOSITORY)
    wait_for([tmp_path / "pid0", tmp_path / "pid1"])
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


FAILS_UNTIL = """
count = folder / f"attempts{rank}"
attempt = int(count.read_text()) if count.exists() else 0
count.write_text(str(attempt + 1))
if rank == 0 and attempt in saves:
    (folder / "run/pretrain_4k/checkpoints" / f"step_{attempt:08d}").mkdir(parents=True)
if rank == 1 and attempt < fails:
    sys.exit(1)
if rank == 0 and attempt < fails:
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("fails", "saves", "attempts", "code"),
    [
        (2, [], 3, 0),  # two failures in a row, then it goes through
        (9, [], 3, 1),  # never: the first and two restarts
        (4, [0, 1, 2, 3], 5, 0),  # four failures, each after a new checkpoint
        (9, [1], 5, 1),  # progress once: the count starts again
    ],
)
def test_restarts_while_there_is_progress(script, tmp_path, monkeypatch, fails, saves, attempts, code, capsys):
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    command = script(f"fails, saves = {fails}, {saves}\n{FAILS_UNTIL}")
    config = settings(max_restarts=2)
    config.launch.grace_seconds = 0.3
    assert launch.supervise(command, 2, tmp_path / "run", config) == code
    assert (tmp_path / "attempts1").read_text() == str(attempts)
    told = capsys.readouterr().err
    assert "rank 1 on" in told
    assert ("given up after 3 failures without a new checkpoint" in told) == bool(code)
    assert (tmp_path / "run" / "logs" / f"attempt_{attempts - 1}" / "rank_00001.log").exists()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-17", "gpu-17"),
        ("n0,n1", "n0"),
        ("n[03-05,9],login", "n03"),
        ("rack[2,4]-gpu", "rack2-gpu"),
        ("a-b.c[007-009]", "a-b.c007"),
    ],
)
def test_first_node_of_slurms_lists(nodes, first):
    assert launch.first_node(nodes) == first


def test_slurm_tasks_agree_on_where_rank_0_is(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "117"}
    launch.settle_slurm(step)
    first = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    launch.settle_slurm({**step, "SLURM_RESTART_COUNT": "1"})
    assert first[0] == os.environ["MASTER_ADDR"] == "n1"
    assert 1024 < int(first[1]) < 65536
    assert os.environ["MASTER_PORT"] != first[1]
    monkeypatch.delenv("MASTER_ADDR")
    launch.settle_slurm({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "117"})  # a batch script, no step
    assert "MASTER_ADDR" not in os.environ


def test_single_with_several_ranks_is_refused(monkeypatch):
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    config = settings()
    config.root, config.name = "runs", "x"
    config.engine = SimpleNamespace(name="single", device="cpu")
    hydra = SimpleNamespace(
        overrides=SimpleNamespace(task=["engine=single"]), mode=None, runtime=SimpleNamespace(config_sources=[])
    )
    with pytest.raises(ConfigError, match="use engine=zero1"):
        launch.launch([config], hydra, Path("train.py"))


def wait_for(files: list[Path]) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Running, not merely waiting to be reaped by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
