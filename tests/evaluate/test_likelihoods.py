"""Scores of continuations against the plain forward pass, with and without a shared context."""

import random

import pytest
import torch

from internlm2.config import RopeScalingConfig
from internlm2.evaluate.scoring import Group, score
from internlm2.model.transformer import CausalLM
from tests.evaluate.conftest import VOCABULARY, small_config


def some_groups(seed: int, longest: int = 40) -> list[Group]:
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high))]

    return [Group(ids(1, longest), [ids(1, 6) for _ in range(draw.randint(1, 5))]) for _ in range(12)]


def plain(model: CausalLM, context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """One forward pass over everything, with all its logits."""
    ids = torch.tensor(context + continuation[:-1])
    with torch.no_grad():
        logits = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32))[len(context) - 1 :].float()
    logprobs = logits.log_softmax(-1)
    wanted = torch.tensor(continuation)
    chosen = logprobs.gather(1, wanted[:, None])[:, 0]
    return chosen.tolist(), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_equals_the_plain_forward_pass(model, batch_tokens):
    groups = some_groups(1)
    for group, scored in zip(groups, score(model, groups, batch_tokens=batch_tokens), strict=True):
        assert len(scored) == len(group.continuations)
        for continuation, one in zip(group.continuations, scored, strict=True):
            logprobs, greedy = plain(model, group.context, continuation)
            assert one.logprobs == pytest.approx(logprobs, abs=2e-5)
            assert one.total == pytest.approx(sum(logprobs), abs=1e-4)
            assert one.greedy == greedy


def test_greedy_continuations_are_found(model):
    context = [1, 5, 9, 200]
    continuation: list[int] = []
    for _ in range(4):
        ids = torch.tensor(context + continuation)
        with torch.no_grad():
            continuation.append(int(model(ids, torch.tensor([0, len(ids)], dtype=torch.int32))[-1].argmax()))
    other = [*continuation[:-1], (continuation[-1] + 1) % VOCABULARY]
    right, wrong = score(model, [Group(context, [continuation, other])])[0]
    assert right.greedy
    assert not wrong.greedy


def test_dynamic_ntk_beyond_the_trained_length():
    """There each sequence's own length decides its rotation, so that a context cannot be shared."""
    scaling = RopeScalingConfig(kind="dynamic", factor=2.0)
    model = CausalLM.from_config(small_config(rope_scaling=scaling, max_position_embeddings=16), seed=3).eval()
    groups = some_groups(2)
    assert any(len(group.context) > 16 for group in groups)
    for group, scored in zip(groups, score(model, groups), strict=True):
        for continuation, one in zip(group.continuations, scored, strict=True):
            assert one.logprobs == pytest.approx(plain(model, group.context, continuation)[0], abs=2e-5)


def test_bfloat16(model):
    half = CausalLM.from_config(model.config, dtype=torch.bfloat16, seed=3).eval()
    groups = some_groups(3)
    for group, scored in zip(groups, score(half, groups), strict=True):
        for continuation, one in zip(group.continuations, scored, strict=True):
            # Two orders of bfloat16 rounding; the logits of this wide model are of size 10.
            assert one.total == pytest.approx(sum(plain(half, group.context, continuation)[0]), abs=0.35)


def test_empty_parts_are_refused(model):
    with pytest.raises(ValueError, match="group 1: the context and every continuation"):
        score(model, [Group([1], [[2]]), Group([], [[2]])])
    with pytest.raises(ValueError, match="group 0"):
        score(model, [Group([1], [[]])])
