"""The CUDA decode attention, executed by the emulation, against float64."""

import pytest
import torch
from cuda_cases import DECODE_CASES, DecodeCase, relative_error
from emulation_build import Emulation
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = pytest.mark.parametrize("case", DECODE_CASES.values(), ids=DECODE_CASES.keys())


def assert_matches(emulation: Emulation, case: DecodeCase) -> None:
    out = emulation.ops.decode_attention(*case.arguments())
    expected = case.reference()
    assert relative_error(out, expected) < 5e-3
    assert not out[case.lengths_tensor == 0].any()


@CASES
def test_matches_float64(scheduled: Emulation, case: DecodeCase) -> None:
    assert_matches(scheduled, case)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=3).filter(any),
    spare=st.integers(0, 300),
    groups=st.integers(1, 2),
    queries=st.integers(1, 8),
    dim=st.sampled_from((64, 128)),
    seed=st.integers(1, 2**20),
)
def test_ragged_rows(emulation_session, lengths, spare, groups, queries, dim, seed) -> None:
    emulation_session.configure(seed=seed, copies=("lazy", "eager", "mixed")[seed % 3])
    assert_matches(emulation_session, DecodeCase(tuple(lengths), max(lengths) + spare, groups, queries, dim, seed=seed))


def test_the_order_of_threads_does_not_change_a_bit(emulation: Emulation) -> None:
    results = []
    for seed in range(3):
        emulation.configure(seed=seed, copies="mixed")
        results.append(emulation.ops.decode_attention(*DECODE_CASES["ragged, many splits"].arguments()))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_a_length_beyond_the_cache_stops_at_its_end(emulation: Emulation) -> None:
    case = DecodeCase((40,), capacity=40)
    q, k, v, _, scale = case.arguments()
    out = emulation.ops.decode_attention(q, k, v, torch.tensor([10**6], dtype=torch.int32), scale)
    assert relative_error(out, case.reference()) < 5e-3


@pytest.mark.parametrize("dim", [64, 128])
def test_shared_memory_is_free_of_bank_conflicts(emulation: Emulation, dim: int) -> None:
    emulation.ops.decode_attention(*DecodeCase((600,), capacity=600, dim=dim).arguments())
    counters = emulation.counters()
    assert counters.ldmatrix > 500
    assert counters.ldmatrix_wavefronts == 4 * counters.ldmatrix
    assert counters.shared_wavefronts == counters.shared_ideal


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda x: x.float(), "q must be bfloat16"),
        (0, lambda x: x[:, :3].contiguous(), "3 query heads do not divide among 2"),
        (0, lambda x: x[..., :32].contiguous(), "head_dim 64 and 128, got 32"),
        (1, lambda x: x[:, :, :-1], "differ in shape"),
        (2, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "call .contiguous"),
        (3, lambda x: x.long(), "lengths must be int32"),
        (3, lambda x: x[:1], "lengths must be \\[2\\]"),
    ],
)
def test_wrong_arguments_are_named(emulation: Emulation, position: int, change, message: str) -> None:
    arguments = list(DecodeCase((9, 4), capacity=12).arguments())
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=message):
        emulation.ops.decode_attention(*arguments)
