"""Attention behind earlier tokens, against whole sequences."""

import pytest
import torch
from attention_cases import bounds, complex_oracle, packed, relative_error, table
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.ops import PREFILL_BLOCK, extension, prefill_attention
from internlm2.ops.reference import rotate, table_rows

BASE = 10_000.0
BACKENDS = ["sdpa", pytest.param("native", marks=pytest.mark.skipif(not extension.load_cpu(), reason="not built"))]


def case(wholes, past, groups, queries, dim, dtype, offsets=None, seed=0):
    """Whole sequences [T], their keys and values in shuffled slots of a cache, and the tokens behind `past`."""
    whole = packed(wholes, groups, queries, dim, dtype, seed)
    cos, sin = table(max(wholes) + max(offsets or [0]), dim, BASE)
    shift = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    at = table_rows(bounds(wholes), shift, len(whole))
    keys = rotate(whole[:, :, -2], cos[at], sin[at]).to(dtype)
    slots = torch.randperm(len(wholes) + 2, generator=torch.Generator().manual_seed(seed))[: len(wholes)]
    cache = torch.full((len(wholes) + 2, groups, 2, max(wholes) + 5, dim), float("nan"), dtype=dtype)
    start, rest = 0, []
    for slot, length, earlier in zip(slots.tolist(), wholes, past):
        here = slice(start, start + length)
        cache[slot, :, 0, :length] = keys[here].transpose(0, 1)
        cache[slot, :, 1, :length] = whole[here, :, -1].transpose(0, 1)
        rest += range(start + earlier, start + length)
        start += length
    tokens = torch.tensor(rest)
    own = [length - earlier for length, earlier in zip(wholes, past)]
    return whole, tokens, (whole[tokens], cache, slots, past, cos, sin, bounds(own), max(own)), shift


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 130), st.integers(1, 70)), min_size=1, max_size=4),
    shape=st.sampled_from([(1, 1, 16), (2, 3, 32), (1, 4, 64)]),
    shifted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_last_tokens_of_whole_sequences(backend, parts, shape, shifted, seed):
    wholes, past = [a + b for a, b in parts], [a for a, _ in parts]
    offsets = [7 * number for number in range(len(parts))] if shifted else None
    whole, tokens, arguments, shift = case(wholes, past, *shape, torch.float32, offsets, seed)
    got = prefill_attention(*arguments, table_offsets=shift, backend=backend)
    assert relative_error(got, complex_oracle(whole, wholes, offsets, BASE)[tokens]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    wholes, past = [150, 40, 9], [96, 0, 8]
    whole, tokens, arguments, _ = case(wholes, past, 2, 3, 32, torch.bfloat16)
    got = prefill_attention(*arguments, backend=backend)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, complex_oracle(whole, wholes, None, BASE)[tokens]) < 6e-3


@pytest.mark.skipif(not extension.load_cpu(), reason="needs the CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_blocks_of_earlier_tokens_change_no_bit(dtype):
    """Also from one block of keys (256) to the next."""
    wholes = [700, 320, 49]
    expected = prefill_attention(*case(wholes, [0, 0, 0], 2, 3, 64, dtype)[2])
    for past in ([PREFILL_BLOCK * 13, 288, 48], [PREFILL_BLOCK, 0, 0]):
        _, tokens, arguments, _ = case(wholes, past, 2, 3, 64, dtype)
        assert torch.equal(prefill_attention(*arguments), expected[tokens])


@pytest.mark.skipif(not extension.load_cpu(), reason="needs the CPU kernels")
def test_as_a_torch_operator():
    *_, (qkv, cache, slots, past, cos, sin, ends, longest), _ = case([20, 9], [13, 0], 2, 3, 32, torch.float32)
    cache = cache.nan_to_num()
    earlier = torch.tensor(past, dtype=torch.int32)
    operator, good = (
        torch.ops.internlm2.prefill_attention,
        [qkv, cache, slots, earlier, cos, sin, ends, None, longest, 0.2],
    )
    torch.library.opcheck(operator, tuple(good))
    for place, wrong, message in (
        (1, cache[:, :1], "cache must be"),
        (1, cache.bfloat16(), "cache must be"),
        (2, slots + 9, "is not one of the cache's"),
        (2, slots[:1], "one a sequence"),
        (3, earlier - 1, "beyond its slot's|sequence 1 ends"),
        (3, earlier + 99, "ends at 119, beyond its slot's 25 tokens"),
        (4, cos[:18], "cos and sin"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*good[:place], wrong, *good[place + 1 :])
    with pytest.raises(RuntimeError, match="table's 18 rows"):
        operator(*good[:4], cos[:18], sin[:18], *good[6:])
