"""Scores into rewards: the order of the steps, the place of the score, moments by parts."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.rlhf.shaping import RunningMoments, shape_scores, token_rewards


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_score_stands_on_the_last_generated_token():
    bounds = torch.tensor([0, 3, 3, 4])  # the second answer has no token
    rewards = token_rewards(column(1.0, 7.0, -2.0), column(0.1, 0.2, 0.3, 0.4), bounds)
    torch.testing.assert_close(rewards, column(-0.1, -0.2, 0.7, -2.4))


def test_normalise_then_clip_then_missing_end():
    scores, lengths = column(9.0, -9.0, 1.0, 9.0), torch.tensor([3, 3, 3, 8])
    shaped = shape_scores(scores, lengths, [True, True, True, False], offset=1.0, scale=2.0, clip=3.0)
    torch.testing.assert_close(shaped, column(3.0, -3.0, 0.0, 3.0))
    replaced = shape_scores(scores, lengths, [True] * 3 + [False], missing_end="replace", missing_end_value=-5.0)
    torch.testing.assert_close(replaced, column(9.0, -9.0, 1.0, -5.0))
    taken = shape_scores(scores, lengths, [True] * 3 + [False], clip=3.0, missing_end="subtract", missing_end_value=2.0)
    torch.testing.assert_close(taken, column(3.0, -3.0, 1.0, 1.0))


def test_soft_overlong_punishment():
    lengths = torch.tensor([1, 6, 8, 10])
    shaped = shape_scores(
        column(0.0, 0.0, 0.0, 0.0), lengths, [True] * 4, length_limit=10, length_buffer=4, length_penalty=2.0
    )
    torch.testing.assert_close(shaped, column(0.0, 0.0, -1.0, -2.0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=0, max_size=9), min_size=1, max_size=6))
def test_running_moments_are_those_of_all_scores(parts):
    running = RunningMoments()
    for part in parts:
        running.update(len(part), sum(part), sum(x * x for x in part))
        again = RunningMoments()
        again.load_state_dict(json.loads(json.dumps(running.state_dict())))
        assert again == running
    everything = torch.tensor([x for part in parts for x in part], dtype=torch.float64)
    if len(everything):
        assert running.mean == pytest.approx(everything.mean().item(), abs=1e-9)
        spread = everything.std(unbiased=False).item()
        assert running.deviation == pytest.approx(spread, abs=1e-5) or spread < 1e-6


def test_moments_before_any_score_change_nothing():
    assert RunningMoments().deviation == 1.0
    assert RunningMoments().mean == 0.0
