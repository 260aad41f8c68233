"""The learning rate is a pure function of the step."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import OPTIM

from internlm2.engine.schedule import learning_rate

PAPER = replace(OPTIM, lr=3e-4, warmup_ratio=0.0)


def test_two_stages_walk_one_cosine_from_the_peak_to_a_tenth():
    first = [learning_rate(s, 909, replace(PAPER, schedule_end=0.909)) for s in range(909)]
    second = [learning_rate(s, 91, replace(PAPER, schedule_start=0.909)) for s in range(91)]
    whole = [learning_rate(s, 1000, PAPER) for s in range(1000)]
    assert first + second == pytest.approx(whole, rel=1e-12)
    assert whole[-1] == pytest.approx(3e-5, rel=1e-12)
    assert whole[499] == pytest.approx(3e-4 * 0.55, rel=1e-12)  # half way: the mean of peak and end


def test_warmup_counts_from_the_start_of_the_stage_and_meets_the_curve():
    late = replace(PAPER, warmup_ratio=0.1, schedule_start=0.5)
    entry = 3e-4 * (0.1 + 0.9 * 0.5)
    rates = [learning_rate(s, 100, late) for s in range(100)]
    assert rates[:10] == pytest.approx([entry * (s + 1) / 10 for s in range(10)])
    assert max(rates) == rates[9] == pytest.approx(entry)
    assert rates[-1] == pytest.approx(3e-5)


def test_linear_constant_and_steps_after_the_end():
    assert learning_rate(4, 10, replace(PAPER, schedule="linear")) == pytest.approx(3e-4 * 0.55)
    assert learning_rate(9, 10, replace(PAPER, schedule="constant")) == 3e-4
    assert learning_rate(15, 10, PAPER) == learning_rate(9, 10, PAPER)
    with pytest.raises(ValueError, match=r"optim\.schedule=sqrt"):
        learning_rate(4, 10, replace(PAPER, schedule="sqrt"))


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["cosine", "linear"]))
def test_bounded_and_falling_after_warmup(total, warmup, start, kind):
    optim = replace(PAPER, warmup_ratio=warmup, schedule_start=start, schedule=kind)
    rates = [learning_rate(s, total, optim) for s in range(total)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert all(a >= b - 1e-18 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert math.isclose(rates[-1], 3e-5) or round(total * warmup) >= total
