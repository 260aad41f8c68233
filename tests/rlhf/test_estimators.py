"""GAE on ragged rows against a slow reference; group baselines; moments over parts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.rlhf.estimators import (
    generalized_advantages,
    grouped_advantages,
    leave_one_out_advantages,
    moments,
    rows_of_tokens,
    standardize,
    sum_of_answers,
)

lengths_of_answers = st.lists(st.integers(0, 9), min_size=1, max_size=7)


def ragged(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(sum(lengths), generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards, values, torch.tensor([0, *lengths]).cumsum(0)


def slow_gae(rewards, values, gamma, lam):
    """The double sum of the definition, one answer."""
    count = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(count)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(count - t)) for t in range(count)]


@settings(max_examples=60, deadline=None)
@given(lengths_of_answers, st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_gae_equals_the_definition(lengths, gamma, lam, seed):
    rewards, values, bounds = ragged(lengths, seed)
    advantages, returns = generalized_advantages(rewards, values, bounds, gamma, lam)
    slow = [
        value
        for first, last in itertools.pairwise(bounds)
        for value in slow_gae(rewards[first:last].tolist(), values[first:last].tolist(), gamma, lam)
    ]
    torch.testing.assert_close(advantages, torch.tensor(slow, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(returns, advantages + values)


@settings(max_examples=30, deadline=None)
@given(lengths_of_answers, st.integers(0, 99))
def test_an_answer_does_not_feel_its_neighbours(lengths, seed):
    rewards, values, bounds = ragged(lengths, seed)
    together, _ = generalized_advantages(rewards, values, bounds, 0.9, 0.8)
    for first, last in itertools.pairwise(bounds):
        alone, _ = generalized_advantages(
            rewards[first:last], values[first:last], torch.tensor([0, last - first]), 0.9, 0.8
        )
        assert torch.equal(alone, together[first:last])


def test_gae_of_nothing_is_nothing():
    empty = torch.empty(0, dtype=torch.float64)
    advantages, returns = generalized_advantages(empty, empty, torch.tensor([0]), 1.0, 0.99)
    assert len(advantages) == len(returns) == 0


def test_group_baselines_by_hand():
    returns = torch.tensor([1.0, 3.0, 5.0, 10.0, 7.0], dtype=torch.float64)
    groups = torch.tensor([8, 8, 8, 2, 8])
    # group 8: 1, 3, 5, 7, mean 4, deviation sqrt(20 / 3); group 2 has one answer
    torch.testing.assert_close(
        leave_one_out_advantages(returns, groups), torch.tensor([-4.0, -4 / 3, 4 / 3, 0.0, 4.0], dtype=torch.float64)
    )
    centred = torch.tensor([-3.0, -1.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(grouped_advantages(returns, groups, scale=False), centred)
    torch.testing.assert_close(grouped_advantages(returns, groups, epsilon=0.5), centred / ((20 / 3) ** 0.5 + 0.5))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=20))
def test_group_advantages_sum_to_zero_and_ignore_the_order(pairs):
    returns = torch.tensor([r for r, _ in pairs], dtype=torch.float64)
    groups = torch.tensor([g for _, g in pairs])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    for estimate in (grouped_advantages, leave_one_out_advantages):
        advantages = estimate(returns, groups)
        for group in groups.unique():
            assert abs(advantages[groups == group].sum().item()) < 1e-9
        torch.testing.assert_close(estimate(returns[order], groups[order]), advantages[order])


def test_equal_returns_give_no_advantage_and_no_nan():
    returns, groups = torch.full((4,), 1.5), torch.zeros(4, dtype=torch.long)
    assert grouped_advantages(returns, groups).abs().max() < 1e-6
    assert leave_one_out_advantages(returns, groups).abs().max() < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.data())
def test_standardizing_by_parts_is_standardizing_the_whole(numbers, data):
    values = torch.tensor(numbers, dtype=torch.float64)
    cut = data.draw(st.integers(0, len(numbers)))
    total = [a + b for a, b in zip(moments(values[:cut]), moments(values[cut:]))]
    parts = torch.cat([standardize(values[:cut], total), standardize(values[cut:], total)])
    torch.testing.assert_close(parts, standardize(values, moments(values)), rtol=1e-6, atol=1e-6)
    if values.std() > 1e-2:
        assert parts.mean().abs() < 1e-6
        assert parts.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)


@given(lengths_of_answers)
def test_rows_and_sums_of_tokens(lengths):
    rewards, _, bounds = ragged(lengths)
    assert rows_of_tokens(bounds).tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    wanted = torch.stack([rewards[first:last].sum() for first, last in itertools.pairwise(bounds)])
    torch.testing.assert_close(sum_of_answers(rewards, bounds), wanted)
