"""pass@k against enumeration, bootstrap intervals against the normal distribution."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2.evaluate.intervals import bootstrap, pass_at_k


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(samples, data):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_the_paper_s_sizes():
    assert pass_at_k(200, 0, 100) == 0.0
    assert pass_at_k(200, 101, 100) == 1.0
    assert pass_at_k(200, 50, 1) == pytest.approx(0.25)
    for wrong in ((3, 1, 4), (3, 1, 0), (3, 4, 1)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*wrong)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.Generator(np.random.PCG64(1)).random(400).tolist()
    found = bootstrap(values, seed=2)
    assert found is not None
    mean, error = np.mean(values), np.std(values) / math.sqrt(len(values))
    assert found == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.3 * error)
    assert bootstrap(values, seed=2) == found
    assert bootstrap([1.0], seed=2) is None
