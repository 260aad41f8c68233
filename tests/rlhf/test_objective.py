"""The actor's and critic's loss as an engine sums it: the same gradient at any split and at two ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from internlm2.data.batch import collate
from internlm2.data.rows import Row
from internlm2.rlhf.experience import Experience, bounds_of, policy_batches
from internlm2.rlhf.kl import k2
from internlm2.rlhf.losses import policy_loss
from internlm2.rlhf.objective import ACTOR_PARTS, actor_loss, critic_loss, pretrain_batches
from tests.rlhf.tiny_policy import CONFIG, critic, policy, rollouts

COEFFICIENT = 0.5


def experience(count=11, seed=0):
    answers = rollouts(count, seed)
    bounds = bounds_of(answers)
    draw = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(int(bounds[-1]), generator=draw, dtype=torch.float64) for _ in range(5)]
    old, reference, values, advantages, returns = numbers
    weights = torch.rand(int(bounds[-1]), generator=draw, dtype=torch.float64) + 0.5
    return Experience(answers, bounds, old - 4, reference - 4, values, advantages, returns, weights)


def documents(count=5, seed=3):
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = draw.integers(0, CONFIG.vocab_size, 12)
        labels = np.where(draw.random(12) < 0.3, -100, np.roll(ids, -1))
        bounds = np.array([0, 5, 12], np.int32)
        rows.append(Row(ids, labels, bounds, np.zeros(2, np.int32), np.arange(2)))
    return rows


def gradient(model, batches, loss_fn, denominator):
    """What an engine does."""
    model.zero_grad()
    for batch in batches:
        (loss_fn(model, batch).sum / denominator).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(whole, rows, budget, docs, docs_a_batch, actions, targets):
    """Micro-batches of a part of the answers and documents; `actions`, `targets` are those of the whole step."""
    packed = [collate(docs[at : at + docs_a_batch]) for at in range(0, len(docs), docs_a_batch)]
    return [*policy_batches(whole, rows, budget), *pretrain_batches(packed, actions, targets, COEFFICIENT)]


LOSS = actor_loss(temperature=0.8, clip=0.2, kl_coefficient=0.1, entropy_coefficient=0.02)


def counts(whole, docs):
    return len(whole.advantages), sum(int((row.labels >= 0).sum()) for row in docs)


@pytest.mark.parametrize(("budget", "docs_a_batch"), [(10_000, 5), (40, 2), (1, 1)])
def test_any_split_has_the_gradient_of_the_whole(budget, docs_a_batch):
    model, whole, docs = policy(), experience(), documents()
    actions, targets = counts(whole, docs)
    rows = list(range(len(whole.rollouts)))
    ours = gradient(model, step(whole, rows, budget, docs, docs_a_batch, actions, targets), LOSS, actions)
    # By the definition: a mean over action tokens plus 0.5 times a mean over pretraining tokens.
    model.zero_grad()
    one = policy_batches(whole, rows, 10_000)[0]
    row = one.packed
    logprobs, entropy = model.logprobs(row.ids, row.cu_seqlens, row.max_seqlen, row.at, row.labels, 0.8)
    surrogate = policy_loss(logprobs, one.old_logprobs, one.advantages, clip=0.2, weights=one.weights).losses
    losses = surrogate + 0.1 * k2(logprobs, one.reference) - 0.02 * entropy
    packed = collate(docs)
    language = model(packed.ids, packed.cu_seqlens, packed.max_seqlen, packed.labels) / targets
    (losses.mean() + COEFFICIENT * language).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-10)


def test_two_ranks_sum_to_one():
    model, whole, docs = policy(), experience(), documents()
    actions, targets = counts(whole, docs)
    rows = list(range(len(whole.rollouts)))
    alone = gradient(model, step(whole, rows, 40, docs, 2, actions, targets), LOSS, actions)
    shared = sum(
        gradient(model, step(whole, rows[rank::2], 25, docs[rank::2], 1, actions, targets), LOSS, actions)
        for rank in range(2)
    )
    torch.testing.assert_close(shared, alone, rtol=1e-8, atol=1e-10)


def test_parts_are_named_alike_and_sum_over_any_split():
    model, whole, docs = policy(), experience(), documents()
    actions, targets = counts(whole, docs)
    rows = list(range(len(whole.rollouts)))
    totals = []
    for budget, size in ((10_000, 5), (30, 1)):
        found = [LOSS(model, batch) for batch in step(whole, rows, budget, docs, size, actions, targets)]
        assert all(tuple(loss.parts) == ACTOR_PARTS for loss in found)
        assert sum(loss.tokens for loss in found) == actions
        totals.append({name: sum(loss.parts[name].item() for loss in found) for name in ACTOR_PARTS})
    assert totals[0] == pytest.approx(totals[1], rel=1e-9)
    assert totals[0]["tokens"] == actions
    assert totals[0]["pretrain_tokens"] == targets


def test_the_critics_loss_by_the_definition():
    model, whole = critic(), experience()
    rows = list(range(len(whole.rollouts)))
    split = gradient(model, policy_batches(whole, rows, 20), critic_loss(), len(whole.returns))
    model.zero_grad()
    row = policy_batches(whole, rows, 10_000)[0]
    values = model(row.packed.ids, row.packed.cu_seqlens, row.packed.max_seqlen)[row.packed.at]
    (0.5 * (values - row.returns).square().mean()).backward()
    torch.testing.assert_close(split, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-8, atol=1e-10)


def test_the_ratio_is_one_at_the_first_minibatch():
    model, whole = policy(dtype=torch.float32), experience()
    with torch.no_grad():
        rows = list(range(len(whole.rollouts)))
        (row,) = policy_batches(whole, rows, 10_000)
        packed = row.packed
        old, _ = model.logprobs(packed.ids, packed.cu_seqlens, packed.max_seqlen, packed.at, packed.labels, 0.8)
        order = torch.cat([torch.arange(whole.bounds[a], whole.bounds[a + 1]) for a in _order(whole)])
        scattered = torch.empty_like(old)
        scattered[order] = old
    fresh = replace(whole, old_logprobs=scattered)
    for batch in policy_batches(fresh, rows[::2], 25):  # a minibatch, packed in another way
        row = batch.packed
        new, _ = model.logprobs(row.ids, row.cu_seqlens, row.max_seqlen, row.at, row.labels, 0.8)
        found = policy_loss(new, batch.old_logprobs, batch.advantages.float())
        assert (found.ratio - 1).abs().max() < 1e-5
        assert not found.clipped.any()


def _order(whole):
    from internlm2.rlhf.experience import plan, sequence_tokens

    (chosen,) = plan([sequence_tokens(answer) for answer in whole.rollouts], 10_000)
    return chosen
