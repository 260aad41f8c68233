"""Best of n against all subsets, one by one."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2.rlhf.best_of import best_of_kl, expected_best_of, powers_of_two


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-9, 9)), min_size=1, max_size=7), st.data())
def test_the_closed_form_is_the_mean_over_all_subsets(answers, data):
    n = data.draw(st.integers(1, len(answers)))
    means = []
    for subset in combinations(answers, n):
        highest = max(score for score, _ in subset)
        best = [value for score, value in subset if score == highest]
        means.append(sum(best) / len(best))
    scores, values = zip(*answers)
    if len(set(scores)) == len(scores):  # of equal scores each subset has other ones: only the mean over them agrees
        assert expected_best_of(scores, values, n) == pytest.approx(sum(means) / len(means))
    assert expected_best_of(scores, scores, n) == pytest.approx(
        sum(max(score for score, _ in subset) for subset in combinations(answers, n)) / len(means)
    )


def test_equal_scores_select_nothing():
    assert expected_best_of([1.0] * 4, [0.0, 1.0, 2.0, 5.0], 3) == pytest.approx(2.0)


def test_kl_is_that_of_the_density_of_the_best():
    # The rank of the best of n is distributed with density n u^(n-1), whose KL to uniform is an integral.
    for n in (1, 2, 16):
        points = [(place + 0.5) / 20_000 for place in range(20_000)]
        integral = sum(n * u ** (n - 1) * math.log(n * u ** (n - 1)) for u in points) / len(points)
        assert best_of_kl(n) == pytest.approx(integral, abs=1e-3)


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="best of 3 of 2"):
        expected_best_of([1.0, 2.0], [1.0, 2.0], 3)


def test_powers_of_two():
    assert powers_of_two(64) == [1, 2, 4, 8, 16, 32, 64]
    assert powers_of_two(5) == [1, 2, 4]
