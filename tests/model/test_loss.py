"""Chunked cross entropy against F.cross_entropy, by value, gradient and allocation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internlm2.model import CausalLM, cross_entropy_sum, token_cross_entropy
from internlm2.model.loss import token_kl, token_logprobs
from internlm2.ops import processor


def inputs(tokens, size, words, dtype=torch.float64, seed=0, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(words, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(words, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, weight, labels


def dense(hidden, weight, labels, reduction="sum"):
    return F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction=reduction)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 40), words=st.integers(2, 50), chunk=st.integers(1, 17), seed=st.integers(0, 99))
def test_value_and_gradients_equal_the_dense_loss(tokens, words, chunk, seed):
    hidden, weight, labels = inputs(tokens, 6, words, seed=seed)
    loss = 0.37 * cross_entropy_sum(hidden, weight, labels, chunk=chunk)
    ours = loss, *torch.autograd.grad(loss, (hidden, weight))
    loss = 0.37 * dense(hidden, weight, labels)
    for own, theirs in zip(ours, (loss, *torch.autograd.grad(loss, (hidden, weight)))):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 30), chunk=st.integers(1, 17), seed=st.integers(0, 99))
def test_losses_of_tokens_take_any_gradient(tokens, chunk, seed):
    hidden, weight, labels = inputs(tokens, 6, 11, seed=seed)
    scale = torch.randn(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours = token_cross_entropy(hidden, weight, labels, chunk=chunk)
    theirs = dense(hidden, weight, labels, "none")
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for own, other in zip(
        torch.autograd.grad(ours @ scale, (hidden, weight)), torch.autograd.grad(theirs @ scale, (hidden, weight))
    ):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "slow"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_low_precision_gradients_are_as_good_as_the_dense_ones(dtype, slow, monkeypatch):
    monkeypatch.setattr(processor, "bfloat16_is_slow", lambda: slow)
    hidden, weight, labels = inputs(600, 32, 200, dtype=dtype)
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(dense(exact_hidden, exact_weight, labels), (exact_hidden, exact_weight))
    loss = cross_entropy_sum(hidden, weight, labels, chunk=128)
    assert loss.dtype == torch.float32
    ours = torch.autograd.grad(loss, (hidden, weight))
    peer = torch.autograd.grad(dense(hidden, weight, labels).float(), (hidden, weight))
    for own, other, truth in zip(ours, peer, exact):
        error = (own.double() - truth).norm() / truth.norm()
        assert error <= 1.2 * (other.double() - truth).norm() / truth.norm() + 1e-7
        assert error < (1e-5 if dtype == torch.float32 else 6e-3)


def test_frozen_inputs_get_no_gradient():
    hidden, weight, labels = inputs(9, 4, 7)
    cross_entropy_sum(hidden.detach(), weight, labels).backward()
    assert hidden.grad is None
    assert weight.grad is not None
    with torch.no_grad():
        assert cross_entropy_sum(hidden, weight, labels).item() == pytest.approx(dense(hidden, weight, labels).item())


def test_nothing_counts_when_every_label_is_ignored():
    hidden, weight, _ = inputs(9, 4, 7)
    loss = cross_entropy_sum(hidden, weight, torch.full((9,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().max() == 0.0
    assert weight.grad.abs().max() == 0.0


def test_large_logits_stay_finite():
    hidden, weight, labels = inputs(20, 4, 7, dtype=torch.float32, ignored=0.0)
    loss = cross_entropy_sum(hidden * 1e4, weight, labels)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, dense(hidden * 1e4, weight, labels))


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, labels = inputs(9, 4, 7)
    with pytest.raises(ValueError, match="labels"):
        cross_entropy_sum(hidden, weight, labels[:-1])


class LargestOutput(TorchDispatchMode):
    """Notes the number of elements behind every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.largest, self.name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() // leaf.element_size() > self.largest:
                self.largest, self.name = leaf.untyped_storage().nbytes() // leaf.element_size(), str(func)
        return out


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_long_row_never_allocates_tokens_by_words_or_tokens_by_tokens(shape, recompute):
    from dataclasses import replace

    tokens = 4096
    config = replace(
        shape("tiny"), vocab_size=16384, hidden_size=64, layers=1, heads=1, kv_heads=1, intermediate_size=64
    )
    model = CausalLM.from_config(config, dtype=torch.bfloat16, seed=0, recompute=recompute)
    ids = torch.randint(16384, (tokens,), generator=torch.Generator().manual_seed(0))
    with LargestOutput() as seen:
        loss, _ = model.loss(ids, ids, torch.tensor([0, tokens], dtype=torch.int32), tokens)
        loss.backward()
    assert (
        seen.largest >= 16384 * 64
    )  # the mode does see the forward and backward: the embedding's gradient is this large
    assert seen.largest < tokens * 2048, seen.name
    assert model.model.tok_embeddings.weight.grad is not None


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 30),
    chunk=st.integers(1, 17),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 99),
)
def test_logprobs_and_entropy_with_a_temperature_equal_the_dense_ones(tokens, chunk, temperature, seed):
    hidden, weight, labels = inputs(tokens, 6, 11, seed=seed, ignored=0.0)
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(tokens, dtype=torch.float64, generator=draw) for _ in range(2))
    ours = token_logprobs(hidden, weight, labels, temperature=temperature, chunk=chunk)
    dense_logs = (hidden @ weight.t() / temperature).log_softmax(-1)
    theirs = dense_logs.gather(1, labels[:, None])[:, 0], -(dense_logs.exp() * dense_logs).sum(-1)
    for own, other in zip(ours, theirs):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
    for weights in ((a, b), (a, None), (None, b)):
        sums = [sum(x @ w for x, w in zip(pair, weights) if w is not None) for pair in (ours, theirs)]
        own, other = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for total in sums)
        for x, y in zip(own, other):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_entropy_of_a_certain_token_is_zero_and_has_a_finite_gradient():
    hidden, weight, labels = inputs(9, 4, 7, dtype=torch.float32, ignored=0.0)
    logprobs, entropy = token_logprobs(hidden * 1e4, weight, labels)
    assert entropy.abs().max() < 1e-4
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 30),
    chunk=st.integers(1, 17),
    temperature=st.sampled_from([1.0, 1.7]),
    seed=st.integers(0, 99),
)
def test_exact_kl_equals_torch_distributions(tokens, chunk, temperature, seed):
    hidden, weight, _ = inputs(tokens, 6, 11, seed=seed)
    other, other_weight, _ = inputs(tokens, 5, 11, seed=seed + 1)
    kl = token_kl(hidden, weight, other, other_weight, temperature=temperature, chunk=chunk)
    p, q = (
        torch.distributions.Categorical(logits=(h @ w.t() / temperature).detach())
        for h, w in ((hidden, weight), (other, other_weight))
    )
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q), rtol=1e-10, atol=1e-10)
