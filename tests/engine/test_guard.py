"""Rollback: counting must not let a run return to the same bad step for ever."""

import math

import pytest

from internlm2.engine.guard import StepGuard, TrainingStopped


def test_steps_walked_again_after_a_rollback_are_no_recovery():
    guard = StepGuard("rollback", None, max_bad_steps=3)
    saved = guard.state_dict()
    for _ in range(2):
        for step in range(5):
            assert guard.judge(step, 1.0, 1.0) == ("applied", "")
        assert guard.judge(5, math.nan, 1.0)[0] == "rollback"
        guard.load_state_dict(saved, after_rollback=True)
    for step in range(5):
        guard.judge(step, 1.0, 1.0)
    with pytest.raises(TrainingStopped, match="bad step number 3"):
        guard.judge(5, math.nan, 1.0)


def test_passing_the_bad_step_is_recovery():
    guard = StepGuard("rollback", None, max_bad_steps=2)
    guard.judge(5, math.inf, 1.0)
    guard.judge(3, 1.0, 1.0)
    assert guard.bad_steps == 1
    guard.judge(5, 1.0, 1.0)
    assert guard.bad_steps == 0


def test_state_survives_and_the_window_is_bounded():
    guard = StepGuard("skip", 2.0, max_bad_steps=2)
    for step in range(200):
        guard.judge(step, 1.0 + step / 7, 1.0)
    assert len(guard.losses) == 64
    other = StepGuard("skip", 2.0, max_bad_steps=2)
    other.load_state_dict(guard.state_dict())
    assert other == guard
    assert other.judge(200, 1e3, 1.0) == guard.judge(200, 1e3, 1.0)
    assert other.bad_steps == 1
