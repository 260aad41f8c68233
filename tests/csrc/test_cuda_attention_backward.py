"""The CUDA attention backward pass, executed by the emulation, against the gradient of the float64 reference."""

import pytest
import torch
from cuda_cases import ATTENTION_CASES, AttentionCase, relative_error
from emulation_build import Emulation
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES.keys())


def gradient(emulation: Emulation, case: AttentionCase) -> torch.Tensor:
    arguments = case.forward_arguments()
    out, lse = emulation.ops.rope_attention_forward(*arguments)
    return emulation.ops.rope_attention_backward(case.grad_out, arguments[0], out, lse, *arguments[1:])


def assert_matches(emulation: Emulation, case: AttentionCase) -> None:
    computed = gradient(emulation, case)
    _, _, expected = case.reference()
    assert computed.shape == expected.shape
    # P and dS are rounded to bf16 between the products: about 2^-9 each, on top of q and k.
    for name, part in (("queries", slice(0, -2)), ("keys", slice(-2, -1)), ("values", slice(-1, None))):
        if expected[:, :, part].norm() < 1e-6:  # one token: the softmax is 1 whatever q and k are
            assert computed[:, :, part].abs().max() < 0.05, name
        else:
            assert relative_error(computed[:, :, part], expected[:, :, part]) < 1e-2, name


@CASES
def test_matches_float64(scheduled: Emulation, case: AttentionCase) -> None:
    assert_matches(scheduled, case)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4).filter(lambda n: max(n) > 1),
    groups=st.integers(1, 2),
    queries=st.integers(1, 3),
    dim=st.sampled_from((64, 128)),
    slack=st.integers(0, 200),
    seed=st.integers(1, 2**20),
)
def test_ragged_packings(emulation_session, lengths, groups, queries, dim, slack, seed) -> None:
    emulation_session.configure(seed=seed, copies=("lazy", "eager", "mixed")[seed % 3])
    assert_matches(emulation_session, AttentionCase(tuple(lengths), groups, queries, dim, slack=slack, seed=seed))


def test_the_order_of_threads_does_not_change_a_bit(emulation: Emulation) -> None:
    results = []
    for seed in range(3):
        emulation.configure(seed=seed, copies="mixed")
        results.append(gradient(emulation, ATTENTION_CASES["block edges, wide"]))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("dim", [64, 128])
def test_shared_memory_is_free_of_bank_conflicts(emulation: Emulation, dim: int) -> None:
    case = AttentionCase((150,), groups=1, queries=1, dim=dim)
    arguments = case.forward_arguments()
    out, lse = emulation.ops.rope_attention_forward(*arguments)
    emulation.reset_counters()
    emulation.ops.rope_attention_backward(case.grad_out, arguments[0], out, lse, *arguments[1:])
    counters = emulation.counters()
    assert counters.ldmatrix > 1000
    assert counters.ldmatrix_wavefronts == 4 * counters.ldmatrix
    assert counters.shared_wavefronts == counters.shared_ideal


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda x: x[:-1].contiguous(), "grad_out must be \\[20, 4, 64\\], got \\[19, 4, 64\\]"),
        (0, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "grad_out must be contiguous"),
        (2, lambda x: x.float(), "out must be bfloat16 on CPU"),
        (3, lambda x: x.t().contiguous(), "lse must be \\[4, 20\\]"),
    ],
)
def test_wrong_arguments_are_named(emulation: Emulation, position: int, change, message: str) -> None:
    case = AttentionCase((20,))
    forward = case.forward_arguments()
    out, lse = emulation.ops.rope_attention_forward(*forward)
    arguments = [case.grad_out, forward[0], out, lse, *forward[1:]]
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=message):
        emulation.ops.rope_attention_backward(*arguments)
