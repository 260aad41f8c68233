"""Twenty kills at random moments, a full disk and a corrupted checkpoint: the run ends as if nothing had happened."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from chaos import EVERY, attempt
from rank_training import ROWS, SPLITTING

from internlm2.engine.checkpoint_format import list_checkpoints
from internlm2.run.metrics import read_records
from tests.ranks import Forked

STEPS, KILLS = 200, 20


def notes(path: Path) -> list[dict]:
    return read_records(path / "notes.jsonl") if (path / "notes.jsonl").exists() else []


def kill_one(forked: Forked, path: Path, chance: random.Random) -> None:
    """Wait until the attempt has made some steps, then kill -9 one rank at a random moment of the next few."""
    before, wanted = len(notes(path)), chance.randint(3, 9)
    while len(notes(path)) < before + wanted and not any_ended(forked):
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.05))
    victim = chance.randrange(len(forked.pids))
    if not any_ended(forked):
        forked.send(victim, signal.SIGKILL)


def any_ended(forked: Forked) -> bool:
    return bool(forked.poll())


def supervise(path: Path, name: str, chance: random.Random, kills: int, damage) -> tuple[int, list[list[int]]]:
    """Start two ranks again and again until they end in order; (rank killed so often, exit codes of each attempt)."""
    killed, history = 0, []
    while True:
        full_disk_at = None if [1, 1] in history else 60
        forked = Forked(attempt, 2, str(path), name, STEPS, full_disk_at, timeout=20.0)
        if killed < kills:
            kill_one(forked, path, chance)
        started = time.monotonic()
        codes = forked.wait(60.0)
        assert time.monotonic() - started < 40.0  # the other rank notices: nobody hangs
        history.append(codes)
        killed += -signal.SIGKILL in codes
        if codes == [0, 0]:
            return killed, history
        assert len(history) < 3 * kills + 10
        damage(len(history), path)


def corrupt_newest(number: int, path: Path) -> None:
    """After the third and the ninth attempt a byte of the newest checkpoint is flipped, as a failing disk does."""
    found = list_checkpoints(path / "checkpoints")
    if number in (3, 9) and found:
        file = found[-1][1] / "rank00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(bytes(content))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("zero1", 1)])
def test_twenty_kills(name, seed, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert Forked(attempt, 2, str(straight), name, STEPS, None).wait() == [0, 0]
    killed, history = supervise(broken, name, random.Random(seed), KILLS, corrupt_newest)
    assert killed == KILLS
    ours, theirs = read_records(broken / "metrics.jsonl"), read_records(straight / "metrics.jsonl")
    assert (broken / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert [record["position"] for record in ours] == [ROWS * step for step in range(1, STEPS + 1)]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)) <= SPLITTING
    happened = notes(broken)
    starts = [record for record in happened if "start" in record]
    assert all(record["start"] % EVERY == 0 for record in starts)
    assert history.count([1, 1]) == 1  # the full disk ended one attempt, on both ranks and by nobody's hand
    assert any(record["skipped"] for record in starts)
    walked = 0  # every attempt goes on at its checkpoint, step by step: none is lost, none is seen twice within it
    for record in happened:
        walked = record["start"] if "start" in record else walked + 1
        assert record.get("step", walked) == walked
    assert json.loads((list_checkpoints(broken / "checkpoints")[-1][1] / "state.json").read_text())["step"] == STEPS
