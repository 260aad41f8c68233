"""A rank that hangs is named by the others, and leaves its stacks."""

import json
import os
import time

import pytest

from internlm2.run.heartbeat import Heartbeat


def fork(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(7)
    return pid


def test_a_hang_ends_the_rank_with_stacks_and_the_culprit(tmp_path):
    """Rank 1 sleeps for ever in its second step; rank 0, one step ahead, waits for it as in a collective."""

    def rank(number: int, steps: int):
        def work():
            with Heartbeat(tmp_path, number, 2, 0.4) as alive:
                for step in range(1, steps + 1):
                    alive.beat(f"step {step}")
                wait_for_ever()

        return work

    def wait_for_ever():
        time.sleep(30)

    started = time.monotonic()
    pids = [fork(rank(0, 3)), fork(rank(1, 2))]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [1, 1]
    assert time.monotonic() - started < 15
    stacks = (tmp_path / "hangs/rank_00001.txt").read_text()
    assert "wait_for_ever" in stacks
    assert "Thread" in stacks
    told = (tmp_path / "hangs/rank_00000.txt").read_text()
    assert "rank 0 has made no progress for 0.4 s after step 3 (engine.hang_seconds)" in told
    assert "behind the others: rank 1, last seen after step 2" in told


def test_progress_goes_on_without_a_hang(tmp_path):
    """Beats postpone the end, and the file says how far the rank is."""
    with Heartbeat(tmp_path, 0, 1, 0.4) as alive:
        for step in range(8):
            time.sleep(0.1)
            alive.beat(f"step {step + 1}")
    record = json.loads((tmp_path / "progress/rank_00000.json").read_text())
    assert record["where"].startswith("step ")
    assert record["pid"] == os.getpid()
    assert list((tmp_path / "hangs").iterdir()) == []


def test_a_failed_rank_says_who_is_behind(tmp_path, caplog):
    other = {"count": 2, "where": "step 1", "host": "node7", "pid": 1}
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress/rank_00001.json").write_text(json.dumps(other))

    def lose_a_peer() -> None:
        with Heartbeat(tmp_path, 0, 3, None) as alive:
            alive.beat("step 1")
            alive.beat("step 2")
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="Connection closed"):
        lose_a_peer()
    assert "rank 0 failed in step 2; never heard of rank 2" in caplog.text
    (tmp_path / "progress/rank_00002.json").write_text(json.dumps({**other, "count": 3}))
    with Heartbeat(tmp_path, 0, 3, None) as alive:
        alive.count = 9
        alive._write()
        assert alive.who_is_behind() == "behind the others: rank 1, last seen after step 1 on node7"


def test_one_rank_without_a_limit_writes_nothing(tmp_path):
    with Heartbeat(tmp_path, 0, 1, None) as alive:
        alive.beat("step 1")
    assert list(tmp_path.iterdir()) == []
