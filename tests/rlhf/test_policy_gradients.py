"""Estimators and losses against brute force: the expected gradient over every answer of an enumerable policy."""

import pytest
import torch

from internlm2.rlhf.estimators import generalized_advantages, grouped_advantages, leave_one_out_advantages
from internlm2.rlhf.kl import k1, k2, k3
from internlm2.rlhf.losses import policy_loss
from internlm2.rlhf.shaping import token_rewards
from tests.rlhf.enumeration import TablePolicy, answers, prefixes, scores

BETA = 0.3


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def objective(policy, reference, score):
    """J = E[score - beta * KL(policy || reference)], by enumeration."""
    return policy.expected(score) - BETA * policy.kl(reference)


def exact_values(policy, reference, score):
    """V of every prefix: expected future reward, the penalty of the tokens to come included."""
    values = {}
    with torch.no_grad():
        for prefix in prefixes():
            total = 0.0
            for answer in answers():
                if answer[: len(prefix)] == prefix:
                    own, other = policy.logprobs(answer)[len(prefix) :], reference.logprobs(answer)[len(prefix) :]
                    total += own.sum().exp() * (score[answer] - BETA * (own - other).sum())
            values[prefix] = total
    return values


def expected_ppo_gradient(policy, reference, score, values, lam):
    """Every answer once, its token losses weighted by its probability."""
    total = torch.zeros((), dtype=torch.float64)
    for answer, probability in policy.weighted():
        new = policy.logprobs(answer)
        old, ref = new.detach(), reference.logprobs(answer).detach()
        bounds = bounds_of([len(answer)])
        rewards = token_rewards(score[answer][None], BETA * k1(old, ref), bounds)
        baseline = torch.stack([values[answer[:t]] for t in range(len(answer))])
        advantages, _ = generalized_advantages(rewards, baseline, bounds, 1.0, lam)
        total = total + probability * policy_loss(new, old, advantages).losses.sum()
    return policy.gradient(total)


@pytest.mark.parametrize("seed", range(3))
def test_ppo_with_any_critic_at_lambda_one_has_the_exact_gradient(seed):
    policy, reference, score = TablePolicy(seed), TablePolicy(seed + 50), scores(seed)
    draw = torch.Generator().manual_seed(seed)
    values = {p: torch.randn((), generator=draw, dtype=torch.float64) for p in prefixes()}
    exact = policy.gradient(objective(policy, reference, score))
    ours = -expected_ppo_gradient(policy, reference, score, values, lam=1.0)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.95, 0.99])
def test_ppo_with_the_true_values_has_the_exact_gradient_at_any_lambda(lam):
    policy, reference, score = TablePolicy(7), TablePolicy(8), scores(9)
    values = exact_values(policy, reference, score)
    exact = policy.gradient(objective(policy, reference, score))
    torch.testing.assert_close(
        -expected_ppo_gradient(policy, reference, score, values, lam), exact, rtol=1e-10, atol=1e-12
    )


def test_a_wrong_critic_biases_a_small_lambda():
    # The test above has teeth: values that are off show as soon as lambda trusts them.
    policy, reference, score = TablePolicy(7), TablePolicy(8), scores(9)
    values = {prefix: value + 1.0 * len(prefix) for prefix, value in exact_values(policy, reference, score).items()}
    exact = policy.gradient(objective(policy, reference, score))
    assert (expected_ppo_gradient(policy, reference, score, values, 0.0) + exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("estimate", "factor"),
    [(leave_one_out_advantages, 1.0), (lambda r, g: grouped_advantages(r, g, scale=False), 0.5)],
    ids=["rloo", "grpo without scale"],
)
def test_critic_free_estimators_over_all_pairs_of_answers(estimate, factor):
    # Two answers a prompt: RLOO is unbiased, GRPO's mean includes the answer itself: (n - 1) / n of the gradient.
    policy, reference, score = TablePolicy(1), TablePolicy(2), scores(3)
    chances = dict(policy.weighted())
    total = torch.zeros((), dtype=torch.float64)
    for first in answers():
        for second in answers():
            pair = (first, second)
            with torch.no_grad():
                returns = torch.stack(
                    [score[a] - BETA * k1(policy.logprobs(a), reference.logprobs(a)).sum() for a in pair]
                )
            advantages = estimate(returns, torch.tensor([4, 4]))
            for answer, advantage in zip(pair, advantages):
                new = policy.logprobs(answer)
                losses = policy_loss(new, new.detach(), advantage.expand(len(answer))).losses
                total = total + chances[first] * chances[second] * losses.sum() / 2
    exact = policy.gradient(objective(policy, reference, score))
    torch.testing.assert_close(-policy.gradient(total), factor * exact, rtol=1e-9, atol=1e-12)


def kl_gradients(estimator):
    """(as a penalty in the reward, as a loss): expected gradients over all first tokens of a six-way choice."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=draw, dtype=torch.float64).requires_grad_()
    reference = torch.randn(6, generator=draw, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    chances = logprobs.exp().detach()
    in_reward = (chances * estimator(logprobs, reference).detach() * logprobs).sum()
    in_loss = (chances * estimator(logprobs, reference)).sum()
    own = (logprobs.exp() * (logprobs - reference)).sum()
    other = (reference.exp() * (reference - logprobs)).sum()
    return [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (in_reward, in_loss, own, other)]


def test_k1_belongs_into_the_reward():
    in_reward, in_loss, reverse, _ = kl_gradients(k1)
    torch.testing.assert_close(in_reward, reverse, rtol=1e-10, atol=1e-12)
    assert in_loss.norm() < 1e-12  # as a loss it does nothing


def test_k2_belongs_into_the_loss():
    in_reward, in_loss, reverse, _ = kl_gradients(k2)
    torch.testing.assert_close(in_loss, reverse, rtol=1e-10, atol=1e-12)
    assert torch.cosine_similarity(in_reward, reverse, dim=0) < 0.9


def test_k3_is_a_metric():
    in_reward, in_loss, reverse, forward = kl_gradients(k3)
    torch.testing.assert_close(in_loss, forward, rtol=1e-10, atol=1e-12)  # the other direction
    torch.testing.assert_close(in_reward, reverse - forward, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_estimate_the_kl_of_whole_answers(seed):
    policy, reference = TablePolicy(seed), TablePolicy(seed + 9)
    with torch.no_grad():
        exact = policy.kl(reference)
        by_token = sum(c * k1(policy.logprobs(a), reference.logprobs(a)).sum() for a, c in policy.weighted())
        by_answer = sum(
            c * k3(policy.logprobs(a).sum()[None], reference.logprobs(a).sum()[None]).sum()
            for a, c in policy.weighted()
        )
    torch.testing.assert_close(by_token, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_answer, exact, rtol=1e-10, atol=1e-12)
