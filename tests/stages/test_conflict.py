"""experiment=conflict through the command line: its table, and a stop that leaves no run behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stages.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start(root, *overrides)`: the experiment in a process of its own; all share one cache of tokenized data."""
    cache = tmp_path_factory.mktemp("cache")

    def begin(root: Path, *overrides: str) -> subprocess.Popen:
        command = [sys.executable, "train.py", "stage=rm", "experiment=conflict", f"root={root}"]
        settings = [f"data.cache_dir={cache}", "conflict.seeds=[1,2]", "reward.validation_pairs=20", "run.log_every=1"]
        return subprocess.Popen([*command, *settings, *overrides], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)

    return begin


def test_it_compares_both_models_and_goes_on_where_it_stopped(start, tmp_path):
    process = start(tmp_path, "train.steps=100000")
    runs = tmp_path / "conflict/conflict"
    logs = [runs / f"seed_1_{arm}/metrics.jsonl" for arm in ("conditional", "unconditional")]
    deadline = time.monotonic() + 300
    while not all(log.exists() and log.stat().st_size for log in logs):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert children
    deadline = time.monotonic() + 20  # multiprocessing's own helper ends when its pipe does
    while any(alive(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    trained = [len(log.read_text().splitlines()) for log in logs]
    assert all(list((log.parent / "checkpoints").iterdir()) for log in logs)
    assert not (runs / "seed_2_conditional/metrics.jsonl").exists()

    steps = max(trained) + 2
    again = start(tmp_path, f"train.steps={steps}", "conflict.processes=1")
    assert again.wait(300) == 0, again.stderr.read()
    records = [json.loads(line) for line in logs[0].read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    results = json.loads((runs / "results.json").read_text())
    assert [(row["seed"], row["arm"]) for row in results] == [
        (seed, arm) for seed in (1, 2) for arm in ("conditional", "unconditional")
    ]
    assert all(row["domains"].keys() == {"brief", "harmless", "helpful"} for row in results)
    # Whoever is told nothing cannot be told something else.
    assert all(bool(row["swap"]["brief"]) == (row["arm"] == "conditional") for row in results)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
