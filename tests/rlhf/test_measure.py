"""Metrics of an iteration against plain numpy, alone and over two ranks."""

import numpy as np
import pytest
import torch

from internlm2.rlhf.experience import Experience, bounds_of
from internlm2.rlhf.measure import actor_numbers, answer_numbers, by_domain, critic_numbers, drift, mean_of
from tests.rlhf.tiny_policy import rollouts


def numbers_of(answers, seed=0):
    draw = torch.Generator().manual_seed(seed)
    bounds = bounds_of(answers)
    logprobs, reference = (torch.randn(int(bounds[-1]), generator=draw) for _ in range(2))
    scores, shaped = (torch.randn(len(answers), generator=draw, dtype=torch.float64) for _ in range(2))
    return scores, shaped, logprobs, reference, bounds


def test_means_by_domain_equal_numpy():
    answers = rollouts(30)
    scores, shaped, logprobs, reference, bounds = numbers_of(answers)
    found = by_domain(
        answers, answer_numbers(scores, shaped, logprobs, reference, bounds, scores * 2), ["math", "talk"], list
    )
    for domain in ("math", "talk", "all"):
        rows = [row for row, a in enumerate(answers) if domain in ("all", a.question.prompt.domain)]
        lengths = np.array([len(answers[row].tokens) for row in rows])
        kl = [(logprobs - reference)[bounds[row] : bounds[row + 1]].sum().item() for row in rows]
        mine, chosen = found[domain], scores[rows].numpy()
        assert mine["answers"] == len(rows)
        assert mine["score"] == pytest.approx(chosen.mean())
        assert mine["score_std"] == pytest.approx(chosen.std())
        assert mine["reward"] == pytest.approx(shaped[rows].mean().item())
        assert mine["gold"] == pytest.approx(2 * chosen.mean())
        assert mine["kl"] == pytest.approx(np.mean(kl), abs=1e-6)
        assert mine["kl_token"] == pytest.approx(np.sum(kl) / lengths.sum(), abs=1e-6)
        assert mine["length"] == pytest.approx(lengths.mean())
        assert mine["ended"] == pytest.approx(np.mean([answers[row].ended for row in rows]))
        assert mine["score_length_correlation"] == pytest.approx(np.corrcoef(chosen, lengths)[0, 1])
        assert mine["kl_k3"] >= 0


def test_two_ranks_measure_what_one_does():
    answers = rollouts(21)
    scores, shaped, logprobs, reference, bounds = numbers_of(answers)
    whole = by_domain(answers, answer_numbers(scores, shaped, logprobs, reference, bounds), ["math", "talk"], list)
    sums = []

    def catch(values):
        sums.append(list(values))
        return list(values)

    for rank in range(2):
        rows = list(range(rank, 21, 2))
        mine = [answers[row] for row in rows]
        at = torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows])
        part = answer_numbers(scores[rows], shaped[rows], logprobs[at], reference[at], bounds_of(mine))
        by_domain(mine, part, ["math", "talk"], catch)
    both = [a + b for a, b in zip(*sums)]
    again = by_domain(answers[:1], answer_numbers(scores[:1], shaped[:1], logprobs[: int(bounds[1])],
                      reference[: int(bounds[1])], bounds[:2]), ["math", "talk"], lambda values: both)  # fmt: skip
    for domain, values in whole.items():
        assert again[domain] == pytest.approx(values)


def test_a_domain_without_answers_and_answers_of_one_score():
    answers = rollouts(2)[:1]
    _, _, logprobs, reference, bounds = numbers_of(answers)
    ones = torch.ones(1, dtype=torch.float64)
    found = by_domain(answers, answer_numbers(ones, ones, logprobs, reference, bounds), ["math", "talk"], list)
    assert found.keys() == {"all", "math"}
    assert found["all"]["score_length_correlation"] is None


@pytest.mark.parametrize(("error", "wanted"), [(0.0, 1.0), (1.0, 0.0), (2.0, -3.0)])
def test_explained_variance(error, wanted):
    returns = torch.randn(500, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(returns)
    found = critic_numbers(
        Experience([], torch.tensor([0]), nothing, nothing, returns * (1 - error), nothing, returns, nothing), list
    )
    assert found["explained_variance"] == pytest.approx(wanted, abs=1e-4)
    assert found["return"] == pytest.approx(returns.mean().item(), abs=1e-6)


def test_a_critic_that_knows_the_mean_alone_explains_nothing():
    returns = torch.randn(500, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(returns)
    constant = torch.full_like(returns, 7.0)
    found = critic_numbers(
        Experience([], torch.tensor([0]), nothing, nothing, constant, nothing, returns, nothing), list
    )
    assert found["explained_variance"] == pytest.approx(0.0, abs=1e-4)


def test_drift_is_the_kl_between_sampler_and_trainer():
    answers = rollouts(400)
    drawn = torch.tensor([value for answer in answers for value in answer.logprobs])
    assert drift(drawn, answers, False, list) == {"kl": 0.0, "mean": 0.0, "largest": 0.0}
    found = drift(drawn - 0.1, answers, False, list)
    assert found["mean"] == pytest.approx(0.1, abs=1e-6)
    assert found["largest"] == pytest.approx(0.1, abs=1e-6)
    assert found["kl"] == pytest.approx(np.exp(-0.1) - 1 + 0.1, abs=1e-6)


def test_actor_numbers_divide_by_their_own_counts():
    parts = {"tokens": 4.0, "policy": 2.0, "ratio": 4.4, "ratio_square": 5.0, "ratio_distance": 0.4, "clipped": 1.0}
    parts |= {"kl_old": 0.2, "kl_loss": 0.0, "entropy": 8.0, "pretrain": 30.0, "pretrain_tokens": 10.0}
    found = actor_numbers(parts)
    assert found["policy_loss"] == 0.5
    assert found["clipped"] == 0.25
    assert found["pretrain_loss"] == 3.0
    assert found["ratio_std"] == pytest.approx((5.0 / 4 - 1.1**2) ** 0.5)
    assert actor_numbers(parts | {"pretrain_tokens": 0.0, "pretrain": 0.0})["pretrain_loss"] is None
    steps = [{"a": 1.0, "b_tokens": 2.0, "c": None}, {"a": 3.0, "b_tokens": 2.0, "c": None}]
    assert mean_of(steps) == {"a": 2.0, "b_tokens": 4.0, "c": None}
