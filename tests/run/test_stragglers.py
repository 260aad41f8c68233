"""A rank that is slow once is forgiven; one that stays slow is named, once in a while."""

from internlm2.run.stragglers import PATIENCE, SILENCE, Stragglers


def test_one_rank_has_no_record():
    assert Stragglers(1.5).observe(1, [2.0]) == {}


def test_the_record():
    record = Stragglers(1.5).observe(1, [1.0, 3.0, 2.0])
    assert record == {"rank_seconds": {"median": 2.0, "fastest": 1.0, "slowest": 3.0, "slowest_rank": 1}}


def test_patience_and_silence(caplog):
    watch = Stragglers(1.5)
    for step in range(1, 2 * SILENCE + 1):
        watch.observe(step, [1.0, 1.0, 1.0, 9.0 if step % 7 == 0 else 1.0])  # now and then
    assert caplog.text == ""
    for step in range(1, SILENCE + PATIENCE + 1):
        watch.observe(step, [1.0, 1.0, 2.0, 1.1])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "rank 2 is a straggler: its forward passes took 2 s in step 5, the median rank's 1.05 s" in said[0]
    assert f"in step {SILENCE + PATIENCE}" in said[1]
