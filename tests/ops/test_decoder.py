"""Packed weights, the decoding step and the draw of tokens: the compiled operators against their plain twins."""

import pytest
import torch
from attention_cases import relative_error, table
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.generation import SamplingParams
from internlm2.generation.projections import projection
from internlm2.generation.sampling import _sample_by_torch
from internlm2.ops import Decoder, DecoderLayer, extension, pack_weight, packed_linear
from internlm2.ops.packed import unpack_weight

pytestmark = pytest.mark.skipif(not extension.load_cpu(), reason="needs the CPU kernels")
ops = torch.ops.internlm2
GROUPS, QUERIES, DIM, HIDDEN, INTERMEDIATE, CAPACITY = 2, 3, 16, 96, 208, 64
HEADS = GROUPS * QUERIES


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 210),
    outputs=st.integers(1, 150),
    inputs=st.one_of(st.integers(1, 300), st.integers(1020, 1100)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_packed_product(rows, outputs, inputs, dtype, seed):
    weight, x = normal(outputs, inputs, seed=seed, dtype=dtype), normal(rows, inputs, seed=seed + 1, dtype=dtype)
    native, twin = (pack_weight(weight, backend=backend) for backend in ("native", "reference"))
    assert torch.equal(native.packed, twin.packed)
    assert torch.equal(unpack_weight(native), weight)
    y = packed_linear(x, native)
    assert y.dtype == dtype
    assert y.shape == (rows, outputs)
    exact = x.double() @ weight.double().t()
    if rows:
        assert relative_error(y, exact) < (3e-6 if dtype == torch.float32 else 4e-3)
        row = seed % rows
        assert torch.equal(packed_linear(x[row : row + 1], native)[0], y[row]), "a row depends on its neighbours"


def decoder(dtype, quantize="none", layers=3):
    def weight(outputs, inputs, seed):
        return projection([normal(outputs, inputs, seed=seed) * inputs**-0.5], dtype, quantize)

    made = [
        DecoderLayer(
            normal(HIDDEN, seed=10 * i, dtype=dtype),
            weight((HEADS + 2 * GROUPS) * DIM, HIDDEN, 10 * i + 1),
            weight(HIDDEN, HEADS * DIM, 10 * i + 2),
            normal(HIDDEN, seed=10 * i + 3, dtype=dtype),
            weight(2 * INTERMEDIATE, HIDDEN, 10 * i + 4),
            weight(HIDDEN, INTERMEDIATE, 10 * i + 5),
        )
        for i in range(layers)
    ]
    return Decoder(made, normal(HIDDEN, seed=7, dtype=dtype), heads=HEADS, eps=1e-5)


def step_arguments(rows, dtype, layers=3):
    """x, caches, lengths, cos, sin, offsets; two slots more than rows."""
    slots = rows + 2
    caches = [normal(slots, GROUPS, 2, CAPACITY, DIM, seed=20 + i, dtype=dtype) for i in range(layers)]
    lengths = torch.arange(slots, dtype=torch.int32) * 7 % (CAPACITY - 1)
    offsets = torch.arange(slots, dtype=torch.int32) % 3
    return normal(rows, HIDDEN, seed=1, dtype=dtype), caches, lengths, *table(CAPACITY + 3, DIM), offsets


@pytest.mark.parametrize("quantize", ["none", "w8", "w4"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_step_equals_its_twin(dtype, limit, quantize, rows):
    # An int8 activation that lies on a tie may fall to either side, and what follows then differs by rounding's size.
    limit = limit if quantize == "none" else 0.03
    made = decoder(dtype, quantize)
    assert made.native
    ours, twin = step_arguments(rows, dtype), step_arguments(rows, dtype)
    hidden, expected = made.step(*ours, backend="native"), made.step(*twin, backend="reference")
    assert relative_error(hidden, expected) < limit
    assert torch.equal(ours[2], twin[2])
    assert ours[2].tolist() == [n * 7 % (CAPACITY - 1) + (n < rows) for n in range(rows + 2)]
    for cache, other, before in zip(ours[1], twin[1], step_arguments(rows, dtype)[1]):
        assert relative_error(cache, other) < limit
        changed = (cache != before).any(-1)
        assert torch.equal(changed[rows:], torch.zeros_like(changed[rows:])), "a slot without a row was written"
        assert int(changed.sum()) == 2 * GROUPS * rows


@pytest.mark.parametrize("quantize", ["none", "w8", "w4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_gives_each_row_the_same_bits_alone_and_on_any_number_of_threads(dtype, quantize):
    before, made, rows = torch.get_num_threads(), decoder(dtype, quantize), 66
    try:
        torch.set_num_threads(1)
        x, caches, lengths, cos, sin, offsets = step_arguments(rows, dtype)
        together = made.step(x, caches, lengths, cos, sin, offsets)
        for row in (0, 31, 65):
            x, caches, lengths, cos, sin, offsets = step_arguments(rows, dtype)
            one = [cache[row : row + 1].contiguous() for cache in caches]
            alone = made.step(x[row : row + 1], one, lengths[row : row + 1], cos, sin, offsets[row : row + 1])
            assert torch.equal(alone[0], together[row])
        for threads in (2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(made.step(*step_arguments(rows, dtype)), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("size", [1, 7, 511, 512, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_equals_its_twin(dtype, size, temperature):
    rows = 200
    logits = (normal(rows, size, seed=size) * 3).to(dtype)
    uniforms = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, logprobs, sampling = ops.draw_tokens(logits, torch.full((rows,), temperature), uniforms)
    twin = _sample_by_torch(logits, [SamplingParams(temperature=temperature)] * rows, uniforms.tolist(), None)
    same = tokens == twin.tokens
    assert same.float().mean() > 0.985, "more than a sum's rounding at a border between two tokens"
    torch.testing.assert_close(logprobs[same], twin.logprobs[same], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sampling[same], twin.sampling_logprobs[same], atol=1e-5, rtol=1e-5)


def test_draw_at_the_ends_of_the_distribution():
    """Never a token of weight 0, however the sums round."""
    logits = torch.full((3, 1300), -float("inf"))
    logits[:, 5], logits[:, 700] = 1.0, 1.0
    uniforms = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    tokens, logprobs, _ = ops.draw_tokens(logits, torch.ones(3), uniforms)
    assert tokens.tolist() == [5, 700, 700]
    torch.testing.assert_close(logprobs, torch.full((3,), 0.5).log())


def test_opcheck_generation():
    made = decoder(torch.float32, "w8", layers=1)
    x, caches, lengths, cos, sin, offsets = step_arguments(2, torch.float32, layers=1)
    norms, weights, scales, bits, intermediate = made._native
    arguments = (x, caches, lengths, cos, sin, offsets, norms, weights, scales, bits, 8, HEADS, intermediate, 1e-5)
    torch.library.opcheck(ops.decode_step, arguments)
    torch.library.opcheck(ops.pack_weight, (normal(70, 33).bfloat16(),))
    torch.library.opcheck(ops.packed_linear, (normal(3, 33), ops.pack_weight(normal(70, 33)), 70, 33))
    torch.library.opcheck(
        ops.draw_tokens, (normal(2, 9), torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.2], dtype=torch.float64))
    )


def wrong_steps():
    made, good = decoder(torch.float32), step_arguments(3, torch.float32)
    x, caches, lengths, cos, sin, offsets = good
    full = lengths.clone()
    full[2] = CAPACITY
    yield made, (x, caches, full, cos, sin, offsets), "row 2 has 64 tokens in a cache for 64"
    yield made, (x, caches, lengths, cos[:9], sin[:9], offsets), "build a longer table"
    yield made, (x, caches[:2], lengths, cos, sin, offsets), "2 layers have 2 norms and 4 weights each"
    yield made, (x, [cache[:2] for cache in caches], lengths, cos, sin, offsets), "a slot for each row"
    yield made, (x, [caches[0], *(c.bfloat16() for c in caches[1:])], lengths, cos, sin, offsets), "of x's dtype"
    yield made, (x.bfloat16(), caches, lengths, cos, sin, offsets), "of x's dtype"
    yield made, (x, caches, lengths.long(), cos, sin, offsets), "lengths must be a contiguous int32"
    yield decoder(torch.bfloat16), good, "norms must be"


@pytest.mark.parametrize("number", range(8))
def test_step_checks_before_it_reads(number):
    made, arguments, message = list(wrong_steps())[number]
    with pytest.raises(RuntimeError, match=message):
        made.step(*arguments)
