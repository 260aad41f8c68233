"""Scores of continuations against the plain forward pass, with and without a shared context."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.config import RopeScalingConfig
from internlm2.evaluate import families as planning
from internlm2.evaluate.families import Family, common, families, passes
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


SHARED_MODEL = CausalLM.from_config(small_config(max_position_embeddings=1024), seed=3).eval()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(
        st.tuples(st.integers(-1, 5), st.integers(0, 90), st.integers(0, 40), st.integers(1, 3)), min_size=2, max_size=8
    ),
    least=st.sampled_from([4, 30]),
    most=st.sampled_from([20, 2048]),
    batch_tokens=st.sampled_from([150, 100_000]),
    seed=st.integers(0, 9),
)
def test_contexts_that_begin_alike(shape, least, most, batch_tokens, seed):
    """Trees of contexts, some equal, some the beginning of others: scores are those of the plain forward pass."""
    draw = random.Random(seed)
    contexts: list[list[int]] = []
    for parent, kept, new, _ in shape:
        old = contexts[parent % len(contexts)][:kept] if contexts and parent >= 0 else []
        contexts.append(old + [draw.randrange(VOCABULARY) for _ in range(new + (not old))])
    groups = [
        Group(context, [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 5))] for _ in range(count)])
        for context, (*_, count) in zip(contexts, shape)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "LEAST_TRUNK", least)
        patch.setattr(planning, "MOST_OWN", most)
        found = score(SHARED_MODEL, groups, batch_tokens=batch_tokens)
    for group, scored in zip(groups, found, strict=True):
        for continuation, one in zip(group.continuations, scored, strict=True):
            logprobs, greedy = plain(SHARED_MODEL, group.context, continuation)
            assert one.logprobs == pytest.approx(logprobs, abs=1e-4)
            assert one.greedy == greedy


def test_common_examples_are_read_once(monkeypatch):
    draw = random.Random(0)
    examples = [draw.randrange(VOCABULARY) for _ in range(300)]
    groups = [Group(examples + [draw.randrange(VOCABULARY) for _ in range(20)], [[1, 2], [3]]) for _ in range(9)]
    read: list[int] = []
    embedding = SHARED_MODEL.model.tok_embeddings
    handle = embedding.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].numel()))
    try:
        score(SHARED_MODEL, groups)
        assert sum(read) == 300 + 9 * 21
        read.clear()
        score(SHARED_MODEL, groups, batch_tokens=400)  # four of the nine in a pass
        assert sum(read) == 3 * 300 + 9 * 21
    finally:
        handle.remove()


def test_families_by_hand(monkeypatch):
    monkeypatch.setattr(planning, "LEAST_TRUNK", 2)
    assert common([1, 2, 3, 4], [1, 2, 3, 9]) == 3
    assert common([1, 2], [1, 2, 3]) == 2
    assert common([5], [6]) == 0
    contexts = [[1, 2, 3, 4], [9, 9, 9], [1, 2, 3, 5], [1, 2, 3, 6]]
    assert families(contexts, [1] * 4) == [Family(3, [0, 2, 3]), Family(3, [1])]
    # Sharing two tokens among three would save 4, three among two saves 3: taken; but not where it saves less.
    assert families([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 7, 7]], [1] * 3) == [Family(2, [0, 1, 2])]
    long = [[1, 2, *range(10, 20), 4], [1, 2, *range(10, 20), 5], [1, 2, 7, 7]]
    assert families(long, [1] * 3) == [Family(4, [2]), Family(12, [0, 1])]
    monkeypatch.setattr(planning, "MOST_OWN", 3)
    # The one with 3 tokens of continuations has 4 of its own.
    assert families(contexts, [1, 1, 3, 1]) == [Family(4, [0]), Family(4, [2]), Family(4, [3]), Family(3, [1])]
    assert passes([Family(3, [0, 2, 3]), Family(3, [1])], [5, 4, 5, 5], 8) == [
        [Family(3, [0, 2])], [Family(3, [3])], [Family(3, [1])]
    ]  # fmt: skip
