"""metrics.jsonl and timing.jsonl, through kills and resumes; wandb offline."""

import json
import math

import pytest

from internlm2.config import WandbConfig
from internlm2.run.directory import RunDirectory
from internlm2.run.metrics import JsonLines, Metrics, read_records

OFF = WandbConfig(mode="disabled", project="internlm2")


def fill(metrics: Metrics, steps) -> None:
    for step in steps:
        metrics.record(step, {"loss": 1 / step, "validation": {"code": {"loss": step / 3}}}, {"seconds": 0.1})


def test_a_resume_leaves_the_file_of_an_uninterrupted_run(tmp_path):
    straight, resumed = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")
    metrics = Metrics(straight, OFF, config={})
    fill(metrics, range(1, 11))
    metrics.close()
    killed = Metrics(resumed, OFF, config={})
    fill(killed, range(1, 8))  # never closed: each record is on disk as soon as it is made
    assert len(read_records(resumed.metrics)) == 7
    with open(resumed.metrics, "a") as file:
        file.write('{"step": 8, "lo')  # the kill came in the middle of a line
    again = Metrics(resumed, OFF, config={})
    again.truncate_after(5)
    assert [r["step"] for r in read_records(resumed.timing)] == [1, 2, 3, 4, 5]
    fill(again, range(6, 11))
    again.close()
    assert resumed.metrics.read_bytes() == straight.metrics.read_bytes()
    assert resumed.timing.read_bytes() == straight.timing.read_bytes()


def test_numbers_survive_exactly_and_nan_becomes_null(tmp_path):
    file = JsonLines(tmp_path / "m.jsonl")
    file.append({"step": 1, "loss": 0.1 + 0.2, "norm": math.nan, "parts": {"a": math.inf, "b": [1.5, -math.inf]}})
    file.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == {
        "step": 1,
        "loss": 0.30000000000000004,
        "norm": None,
        "parts": {"a": None, "b": [1.5, None]},
    }


def test_truncate_counts_and_tolerates_an_unfinished_line(tmp_path):
    file = JsonLines(tmp_path / "m.jsonl")
    assert file.truncate_after(3) == 0
    for step in range(1, 6):
        file.append({"step": step})
    assert file.truncate_after(3) == 2
    assert file.truncate_after(3) == 0
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st')
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl")] == [1]
    file.truncate_after(3)
    file.append({"step": 2})
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl")] == [1, 2]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.jsonl"]


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    file = JsonLines(tmp_path / "m.jsonl")
    with pytest.raises(OSError, match=r"No space left on device: '.*m\.jsonl'"):
        file.append({"step": 1})


def test_other_ranks_write_nothing(tmp_path):
    run = RunDirectory(tmp_path)
    metrics = Metrics(run, OFF, config={}, enabled=False)
    fill(metrics, range(1, 3))
    metrics.truncate_after(1)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb_offline_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "")
    run = RunDirectory(tmp_path / "tiny" / "pretrain_4k")
    identities = []
    for start in (1, 4):
        metrics = Metrics(run, WandbConfig(mode="offline", project="internlm2"), config={"seed": 1})
        identities.append(metrics._wandb.id)
        fill(metrics, range(start, start + 3))
        metrics.close()
    assert identities[0] == identities[1] == json.loads((run.path / "wandb.json").read_text())["id"]
    files = list((run.path / "wandb").glob(f"offline-run-*-{identities[0]}/run-{identities[0]}.wandb"))
    assert len(files) == 2
    assert all(file.stat().st_size > 0 for file in files)
