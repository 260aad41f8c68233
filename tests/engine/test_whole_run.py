"""A run that was killed and stopped on the way leaves what an undisturbed one leaves, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from internlm2.engine.checkpoint_reader import CheckpointReader, find_newest
from internlm2.run.metrics import read_records

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with an undisturbed and an interrupted run in each precision; one process starts them all."""
    root = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("mini_run.py")
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{script.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(root / "fp32"), "fp32", str(root / "bf16"), "bf16"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    assert [json.loads(line) for line in process.stdout.splitlines()] == [[0, -9, -9, 143, 130, 0]] * 2
    return root


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_interrupted_run_equals_an_undisturbed_one(runs, dtype):
    straight, broken = runs / dtype / "straight", runs / dtype / "broken"
    assert (straight / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    records = read_records(straight / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 31))
    assert [record["step"] for record in records if not record["applied"]] == [11]
    assert records[10]["loss"] is None
    readers = []
    for path in (straight, broken):
        newest, skipped = find_newest(path / "checkpoints")
        assert newest is not None
        assert skipped == []
        readers.append(CheckpointReader(newest))
    assert readers[0].state == readers[1].state
    assert readers[0].state["engine"]["adam_step"] == 29
    for name in readers[0].shapes:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(readers[0].full(name, kind), readers[1].full(name, kind)), (name, kind)
