"""The CUDA attention forward pass, executed by the emulation, against float64."""

import pytest
import torch
from cuda_cases import ATTENTION_CASES, AttentionCase, relative_error
from emulation_build import Emulation
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES.keys())


def assert_matches(emulation: Emulation, case: AttentionCase) -> None:
    out, lse = emulation.ops.rope_attention_forward(*case.forward_arguments())
    expected, expected_lse, _ = case.reference()
    # Results in bf16 are off by up to 2^-8 of themselves, 2e-3 on average; rotated q and k are rounded once more.
    assert relative_error(out, expected) < 5e-3
    assert (lse - expected_lse).abs().max() < 2e-2


@CASES
def test_matches_float64(scheduled: Emulation, case: AttentionCase) -> None:
    assert_matches(scheduled, case)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4).filter(any),
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
    case = ATTENTION_CASES["short and empty"]
    results = []
    for seed in range(3):
        emulation.configure(seed=seed, copies="mixed")
        results.append(emulation.ops.rope_attention_forward(*case.forward_arguments()))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_no_tokens(emulation: Emulation) -> None:
    empty = AttentionCase((0, 0))
    out, lse = emulation.ops.rope_attention_forward(*empty.forward_arguments())
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)


def test_a_table_too_short_for_an_offset_gives_nan_and_no_stray_load(emulation: Emulation) -> None:
    case = AttentionCase((8, 8), groups=1, queries=1, offsets=(0, 4))
    arguments = list(case.forward_arguments())
    arguments[1], arguments[2] = case.cos[:10].clone(), case.sin[:10].clone()  # the second sequence needs rows 4 .. 11
    out, _ = emulation.ops.rope_attention_forward(*arguments)
    assert out[:14].isfinite().all()
    assert out[14:].isnan().all()


@pytest.mark.parametrize("dim", [64, 128])
def test_shared_memory_is_free_of_bank_conflicts(emulation: Emulation, dim: int) -> None:
    case = AttentionCase((150,), groups=1, queries=1, dim=dim)
    emulation.ops.rope_attention_forward(*case.forward_arguments())
    counters = emulation.counters()
    assert counters.ldmatrix > 1000
    assert counters.ldmatrix_wavefronts == 4 * counters.ldmatrix
    assert counters.shared_wavefronts == counters.shared_ideal


def _change(**changes):
    names = ("qkv", "cos", "sin", "cu_seqlens", "table_offsets", "max_seqlen", "scale")

    def apply(case: AttentionCase) -> list:
        values = dict(zip(names, case.forward_arguments()))
        values.update({name: change(values[name]) for name, change in changes.items()})
        return list(values.values())

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(qkv=lambda x: x.float()), "qkv must be bfloat16 on CPU"),
        (_change(qkv=lambda x: x[..., :48]), "head_dim 64 and 128, got 48"),
        (_change(qkv=lambda x: x[:, :, :2]), "queries \\+ 2, head_dim\\], got \\[20, 2, 2, 64\\]"),
        (_change(qkv=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)), "call .contiguous"),
        (_change(cos=lambda x: x.double()), "cos must be float32"),
        (_change(sin=lambda x: x[:-1].contiguous()), "cos and sin must be \\[positions, 32\\]"),
        (_change(cos=lambda x: x[:5].contiguous(), sin=lambda x: x[:5].contiguous()), "build a longer table"),
        (_change(cu_seqlens=lambda x: x.long()), "cu_seqlens must be int32"),
        (_change(table_offsets=lambda x: torch.zeros(5, dtype=torch.int32)), "table_offsets must be \\[1\\]"),
        (_change(max_seqlen=lambda x: 0), "max_seqlen is 0"),
    ],
)
def test_wrong_arguments_are_named(emulation: Emulation, change, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulation.ops.rope_attention_forward(*change(AttentionCase((20,))))
