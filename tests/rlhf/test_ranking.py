"""Ranking losses and barrier: values worked out by hand, finite differences, symmetry, and scores beyond the bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.rlhf.ranking import focal_ranking_losses, log_barrier, pair_barriers, ranking_losses

SCORES = st.floats(-4.9, 4.9, allow_nan=False)


def scores(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def logit(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize(("p", "loss"), [(0.5, 0.69315), (0.6, 0.32693), (0.75, 0.07192), (0.9, 0.00421)])
def test_focal_values(p, loss):
    for detach in (False, True):
        value = focal_ranking_losses(scores(logit(p) + 1.5), scores(1.5), detach=detach)
        assert value.item() == pytest.approx(loss, abs=6e-6)
    assert value.item() == pytest.approx((1 - 2 * (p - 0.5)) ** 2 * -math.log(p))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.499])
def test_a_wrong_pair_has_the_plain_loss(p):
    assert focal_ranking_losses(scores(logit(p)), scores(0.0)).item() == pytest.approx(-math.log(p))
    assert ranking_losses(scores(logit(p)), scores(0.0)).item() == pytest.approx(-math.log(p))


@pytest.mark.parametrize(
    ("difference", "full", "detached"), [(0.5, -0.552, -0.215), (2.0, -0.0195, -0.0068), (-1.0, -0.731, -0.731)]
)
def test_the_gradient_goes_through_the_focal_weight_unless_detached(difference, full, detached):
    for detach, expected in ((False, full), (True, detached)):
        chosen, rejected = scores(difference), scores(0.0)
        focal_ranking_losses(chosen, rejected, detach=detach).sum().backward()
        assert chosen.grad.item() == pytest.approx(expected, abs=6e-4)
        assert rejected.grad.item() == pytest.approx(-chosen.grad.item())


def test_the_focal_gradient_jumps_at_equal_scores():
    below, above = scores(-1e-9), scores(1e-9)
    (focal_ranking_losses(below, scores(0.0)) + focal_ranking_losses(above, scores(0.0))).sum().backward()
    assert below.grad.item() == pytest.approx(-0.5, abs=1e-6)
    assert above.grad.item() == pytest.approx(-0.5 - math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda c, r: ranking_losses(c, r),
        lambda c, r: ranking_losses(c, r, margin=torch.tensor([0.3, -0.2, 1.0, 0.0, 2.0])),
        lambda c, r: focal_ranking_losses(c, r, gamma=2.0),
        lambda c, r: focal_ranking_losses(c, r, gamma=1.5, margin=0.4),
        lambda c, r: pair_barriers(c, r),
    ],
)
def test_gradients_equal_finite_differences(loss):
    chosen, rejected = scores(-4.2, 0.3, 2.0, 4.9, 6.0), scores(1.0, -0.4, 2.5, -4.99, -7.0)
    assert torch.autograd.gradcheck(loss, (chosen, rejected), eps=1e-7, atol=1e-3, rtol=1e-4)


@settings(deadline=None)
@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=8), st.floats(-3, 3))
def test_only_the_difference_counts_and_both_sides_feel_it_alike(pairs, shift):
    chosen, rejected = (torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in zip(*pairs))
    for loss in (ranking_losses, focal_ranking_losses):
        value = loss(chosen, rejected)
        torch.testing.assert_close(loss(chosen + shift, rejected + shift), value, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(loss(-rejected, -chosen), value, atol=0, rtol=0)
        up, down = torch.autograd.grad(value.sum(), (chosen, rejected))
        torch.testing.assert_close(up, -down, atol=0, rtol=0)
        assert (up < 0).all()
    torch.testing.assert_close(log_barrier(-chosen), log_barrier(chosen), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(pair_barriers(chosen, rejected), pair_barriers(rejected, chosen), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("score", "value"), [(0, -3.21888), (1, -3.17805), (3, -2.77259), (4, -2.19722), (4.9, 0.01005)]
)
def test_barrier_values(score, value):
    assert log_barrier(scores(float(score))).item() == pytest.approx(value, abs=6e-6)
    assert log_barrier(scores(-float(score))).item() == pytest.approx(value, abs=6e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("score", [4.999, 5.0, 50.0])
def test_an_escaped_score_is_pulled_back(score, dtype):
    escaped = scores(score, -score, dtype=dtype)
    value = log_barrier(escaped)
    assert value.isfinite().all()
    value.sum().backward()
    assert escaped.grad.isfinite().all()
    assert escaped.grad[0] > 900  # down
    assert escaped.grad[1] < -900  # up
    assert escaped.grad[0] < 1100


def test_the_tangent_meets_the_barrier():
    inside, outside = log_barrier(scores(4.999 - 1e-9)), log_barrier(scores(4.999 + 1e-9))
    assert inside.item() == pytest.approx(outside.item(), abs=1e-4)
    rising = log_barrier(scores(4.9, 4.999, 5.0, 8.0, 50.0))
    assert (rising.diff() > 0).all()


def test_which_mean_is_meant():
    """The mean over pairs is the mean over all scores, also with several pairs that share one."""
    chosen, rejected = scores(1.0, 4.0, 1.0), scores(-3.0, 0.0, 4.9)
    both = torch.cat([chosen, rejected])
    assert pair_barriers(chosen, rejected).mean().item() == pytest.approx(log_barrier(both).mean().item())


def test_bfloat16_scores_are_raised_to_float32():
    loss = focal_ranking_losses(scores(1.0, dtype=torch.bfloat16), scores(0.5, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert log_barrier(scores(1.0, dtype=torch.bfloat16)).dtype == torch.float32
