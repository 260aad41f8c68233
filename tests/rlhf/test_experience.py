"""Packing of answers: positions, order, minibatches; packed log-probabilities and values against one answer alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.rlhf.experience import bounds_of, each_token, minibatches, pack, plan, sequence_tokens
from tests.rlhf.tiny_policy import critic, policy, rollouts


def alone(model, rollout):
    """Log-probabilities of one answer from the logits of its whole sequence: token t from the logits at t - 1."""
    ids = torch.tensor(rollout.question.ids + rollout.tokens)
    logits = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32)).log_softmax(-1)
    first = len(rollout.question.ids)
    return torch.stack([logits[at - 1, ids[at]] for at in range(first, len(ids))])


@torch.no_grad()
def test_packed_logprobs_are_those_of_each_answer_alone():
    model, answers = policy(), rollouts(13)
    packs = plan([sequence_tokens(answer) for answer in answers], 30)
    assert len(packs) > 2
    logprobs, entropy = each_token(
        lambda row: model.logprobs(row.ids, row.cu_seqlens, row.max_seqlen, row.at, row.labels), answers, packs, "cpu"
    )
    wanted = torch.cat([alone(model, answer) for answer in answers])
    torch.testing.assert_close(logprobs.double(), wanted, rtol=1e-6, atol=1e-6)
    assert (entropy > 0).all()


@torch.no_grad()
def test_a_value_is_read_before_its_action():
    model, answers = critic(), rollouts(5)
    packs = plan([sequence_tokens(answer) for answer in answers], 1000)
    (values,) = each_token(lambda row: [model(row.ids, row.cu_seqlens, row.max_seqlen)[row.at]], answers, packs, "cpu")
    wanted = []
    for answer in answers:
        for t in range(len(answer.tokens)):  # the state before token t holds the prompt and t tokens, no more
            ids = torch.tensor(answer.question.ids + answer.tokens[:t])
            wanted.append(model(ids, torch.tensor([0, len(ids)], dtype=torch.int32))[-1])
    torch.testing.assert_close(values.double(), torch.stack(wanted), rtol=1e-6, atol=1e-6)


def test_the_last_token_is_predicted_and_never_read():
    (answer,) = rollouts(1, seed=4)
    packed = pack([answer])
    assert packed.ids.tolist() == answer.question.ids + answer.tokens[:-1]
    assert packed.labels.tolist() == answer.tokens
    assert packed.at.tolist() == [len(answer.question.ids) - 1 + t for t in range(len(answer.tokens))]
    assert len(packed.ids) == sequence_tokens(answer)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 60), st.integers(1, 8))
def test_plans_hold_every_row_once_within_the_budget(sizes, budget, parts):
    packs = plan(sizes, budget, parts)
    assert sorted(row for rows in packs for row in rows) == list(range(len(sizes)))
    assert all(len(rows) == 1 or sum(sizes[row] for row in rows) <= budget for rows in packs)
    assert len(packs) >= min(parts, len(sizes))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 9))
def test_minibatches_divide_the_rows_anew_in_each_epoch(rows, count, seed):
    first = list(minibatches(rows, count, seed, 3, 0))
    assert len(first) == count
    assert sorted(row for part in first for row in part) == list(range(rows))
    assert first == list(minibatches(rows, count, seed, 3, 0))
    if rows > 10 and count > 1:
        assert first != list(minibatches(rows, count, seed, 3, 1))


def test_bounds_count_the_tokens():
    answers = rollouts(4)
    assert bounds_of(answers).diff().tolist() == [len(answer.tokens) for answer in answers]
