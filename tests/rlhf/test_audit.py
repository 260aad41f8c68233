"""The audit model's verdict, against numpy and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2.config.compose import load_group
from internlm2.config.rounds import RoundsConfig
from internlm2.rlhf.audit import correlation, judge

LIMITS = load_group(RoundsConfig, "rounds/default").audit


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=50))
def test_correlation_is_numpys(points):
    first, second = [a for a, _ in points], [b for _, b in points]
    if np.std(first) < 1e-3 or np.std(second) < 1e-3:
        return
    assert correlation(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1], abs=1e-6)


def test_correlation_of_what_has_none():
    assert correlation([1.0, 1.0], [1.0, 2.0]) is None
    assert correlation([1.0], [2.0]) is None
    with pytest.raises(ValueError, match="1 and 2 numbers"):
        correlation([1.0], [1.0, 2.0])


def noisy(shift: float, noise: float, seed: int) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=400)
    return list(truth + shift), list(truth + noise * rng.normal(size=400))


def test_a_healthy_round_raises_no_alarm():
    start, late = noisy(0.0, 0.5, 0), noisy(2.0, 0.5, 1)
    late = (late[0], [score + 1.4 for score in late[1]])
    verdict = judge(start, late, LIMITS)
    assert not verdict.alarm
    assert verdict.gain_ratio == pytest.approx(0.7, abs=0.15)
    assert verdict.correlation_late == pytest.approx(0.9, abs=0.05)


def test_a_gain_that_is_not_shared_raises_the_alarm():
    verdict = judge(noisy(0.0, 0.5, 0), noisy(2.0, 0.5, 1), LIMITS)
    assert verdict.alarm
    assert any("a share of" in reason for reason in verdict.reasons)


def test_disagreement_raises_the_alarm():
    start, late = noisy(0.0, 0.5, 0), noisy(2.0, 5.0, 1)
    verdict = judge(start, (late[0], [score + 1.9 for score in late[1]]), LIMITS)
    assert verdict.alarm
    assert any("correlate" in reason for reason in verdict.reasons)
    assert verdict.record()["alarm"] is True


def test_a_round_without_a_gain_has_no_ratio():
    start = noisy(0.0, 0.1, 0)
    assert judge(start, start, LIMITS).gain_ratio is None
    assert not judge(start, start, LIMITS).alarm
