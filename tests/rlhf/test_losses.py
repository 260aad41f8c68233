"""PPO's losses by hand, their clamps, and truncated importance weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.rlhf.kl import KLController
from internlm2.rlhf.losses import importance_weights, policy_loss, value_loss


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_clipped_surrogate_by_hand():
    ratios = column(1.0, 1.5, 0.5, 1.5, 0.5)
    advantages = column(2.0, 2.0, 2.0, -2.0, -2.0)
    found = policy_loss(ratios.log(), torch.zeros_like(ratios), advantages)
    torch.testing.assert_close(found.losses, column(-2.0, -2.4, -1.0, 3.0, 1.6))
    assert found.clipped.tolist() == [False, True, False, False, True]
    torch.testing.assert_close(found.ratio, ratios)
    torch.testing.assert_close(found.kl, ratios - 1 - ratios.log())


def test_the_gradient_stops_where_the_ratio_is_clipped():
    logprobs = column(1.5, 0.5, 1.1).log().requires_grad_()
    found = policy_loss(logprobs, torch.zeros(3, dtype=torch.float64), column(1.0, -1.0, 1.0))
    found.losses.sum().backward()
    torch.testing.assert_close(logprobs.grad, column(0.0, 0.0, -1.1))


def test_dual_clip_bounds_bad_actions_only():
    ratios = column(10.0, 10.0, 2.0)
    advantages = column(-1.0, 1.0, -1.0)
    plain = policy_loss(ratios.log(), torch.zeros(3, dtype=torch.float64), advantages)
    dual = policy_loss(ratios.log(), torch.zeros(3, dtype=torch.float64), advantages, dual_clip=3.0)
    torch.testing.assert_close(plain.losses, column(10.0, -1.2, 2.0))
    torch.testing.assert_close(dual.losses, column(3.0, -1.2, 2.0))
    assert dual.clipped.tolist() == [True, True, False]


def test_a_runaway_ratio_stays_finite():
    found = policy_loss(column(0.0, -1e4), column(-1e4, 0.0), column(-1.0, 1.0))
    assert torch.isfinite(found.losses).all()
    assert found.ratio[0].item() == pytest.approx(math.exp(20))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 3)), min_size=1, max_size=20))
def test_the_first_step_is_the_policy_gradient(pairs):
    # ratio 1: the loss is -A, its gradient -A, nothing is clipped, and the KL to the old policy is 0
    logprobs = column(*(p for p, _ in pairs)).requires_grad_()
    advantages = column(*(a for _, a in pairs))
    found = policy_loss(logprobs, logprobs.detach(), advantages)
    found.losses.sum().backward()
    torch.testing.assert_close(found.losses.detach(), -advantages)
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert not found.clipped.any()
    assert found.kl.abs().max() == 0


def test_importance_weights_are_cut_from_above_only():
    old, sampled = column(-1.0, -1.0, -1.0, -1.0), column(-1.0, -3.0, 0.0, -500.0)
    torch.testing.assert_close(importance_weights(old, sampled, 2.0), column(1.0, 2.0, math.exp(-1), 2.0))
    weighted = policy_loss(old, old, column(1.0, 1.0, 1.0, 1.0), weights=importance_weights(old, sampled, 2.0))
    torch.testing.assert_close(weighted.losses, -column(1.0, 2.0, math.exp(-1), 2.0))


def test_value_loss_by_hand():
    values, returns, old = column(1.0, 3.0, -1.0), column(2.0, 2.0, 2.0), column(0.0, 2.9, 1.0)
    torch.testing.assert_close(value_loss(values, returns), column(0.5, 0.5, 4.5))
    # clipped to old +- 0.5: 0.5, 3.0, 0.5; the larger loss of both counts
    torch.testing.assert_close(value_loss(values, returns, old, 0.5), column(1.125, 0.5, 4.5))
    with pytest.raises(ValueError, match="values of the rollout"):
        value_loss(values, returns, clip=0.5)


def test_the_kl_controller():
    fixed = KLController(0.01)
    fixed.update(50.0, 100)
    assert fixed.coefficient == 0.01
    drawn = KLController(0.1, target=6.0, horizon=1000)
    drawn.update(12.0, 100)  # twice the target: the error is cut to 0.2
    assert drawn.coefficient == pytest.approx(0.1 * 1.02)
    drawn.update(0.0, 100)
    assert drawn.coefficient == pytest.approx(0.1 * 1.02 * 0.98)
    restored = KLController(0.1, target=6.0, horizon=1000)
    restored.load_state_dict(drawn.state_dict())
    assert restored.coefficient == drawn.coefficient
