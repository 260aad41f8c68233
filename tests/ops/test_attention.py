"""The attention contract, held by every backend that runs here, against a float64 oracle by complex numbers."""

import pytest
import torch
from attention_cases import bounds, complex_oracle, packed, relative_error, table
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.ops import decode_attention, describe_backend, rope_attention, select_backend
from internlm2.ops.attention import BACKENDS


def runnable(dtype: torch.dtype, dim: int) -> list[str]:
    names = []
    for name in BACKENDS[1:]:
        try:
            names.append(select_backend("cpu", dtype, dim, name))
        except ValueError:
            continue
    return names


CPU_BACKENDS = runnable(torch.float32, 32)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("groups", "queries", "dim", "lengths"),
    [(2, 2, 32, [5, 0, 1, 40]), (1, 1, 16, [1]), (3, 4, 64, [70, 3, 129]), (1, 8, 128, [65]), (2, 3, 96, [33, 64])],
)
def test_forward_against_complex_oracle(backend, dtype, groups, queries, dim, lengths):
    qkv = packed(lengths, groups, queries, dim, dtype)
    cos, sin = table(max(lengths) + 7, dim)
    offsets = [index % 7 for index in range(len(lengths))]
    out = rope_attention(
        qkv,
        cos,
        sin,
        bounds(lengths),
        max(lengths),
        table_offsets=torch.tensor(offsets, dtype=torch.int32),
        backend=backend,
    )
    assert out.dtype == dtype
    assert out.shape == (sum(lengths), groups * queries, dim)
    assert relative_error(out, complex_oracle(qkv, lengths, offsets, 10_000.0)) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_against_float64(backend, dtype):
    lengths, groups, queries, dim = [50, 1, 0, 131], 2, 3, 64
    qkv = packed(lengths, groups, queries, dim, dtype)
    grad = torch.randn(sum(lengths), groups * queries, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    cos, sin = table(200, dim)
    exact = qkv.double().requires_grad_()
    complex_oracle(exact, lengths, None, 10_000.0).backward(grad.double())
    ours = qkv.clone().requires_grad_()
    rope_attention(ours, cos, sin, bounds(lengths), 131, backend=backend).backward(grad)
    limit = 5e-6 if dtype == torch.float32 else 8e-3
    for part in (slice(0, -2), slice(-2, -1), slice(-1, None)):  # queries, keys, values
        assert relative_error(ours.grad[:, :, part], exact.grad[:, :, part]) < limit


def test_gradcheck_reference_float64():
    lengths = [4, 1, 0, 3]
    cos, sin = table(20, 16)
    qkv = packed(lengths, 2, 2, 16, torch.float64).requires_grad_()
    offsets = torch.tensor([0, 5, 1, 9], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda x: rope_attention(x, cos, sin, bounds(lengths), 4, table_offsets=offsets), (qkv,), fast_mode=True
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_documents_do_not_see_each_other(backend):
    """Neighbours full of NaN change no bit of a packed sequence, and alone it gives the same."""
    lengths, dim = [37, 20, 64], 32
    qkv = packed(lengths, 2, 2, dim, torch.float32)
    cos, sin = table(64, dim)
    together = rope_attention(qkv, cos, sin, bounds(lengths), 64, backend=backend)
    alone = rope_attention(qkv[37:57], cos, sin, bounds([20]), 20, backend=backend)
    assert relative_error(together[37:57], alone) < 1e-6
    poisoned = qkv.clone()
    poisoned[:37] = float("nan")
    poisoned[57:] = float("nan")
    assert torch.equal(rope_attention(poisoned, cos, sin, bounds(lengths), 64, backend=backend)[37:57], together[37:57])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_tokens_at_all(backend):
    qkv = torch.zeros(0, 2, 4, 32, requires_grad=True)
    cos, sin = table(4, 32)
    out = rope_attention(qkv, cos, sin, torch.tensor([0], dtype=torch.int32), 0, backend=backend)
    assert out.shape == (0, 4, 32)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    groups=st.integers(1, 3),
    queries=st.integers(1, 5),
    dim=st.sampled_from([16, 32, 48, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_any_shape_agrees_with_reference(backend, lengths, groups, queries, dim, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    offsets = torch.randint(0, 30, (len(lengths),), generator=draw, dtype=torch.int32)
    qkv = packed(lengths, groups, queries, dim, dtype, seed).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    grad = torch.randn(sum(lengths), groups * queries, dim, generator=draw)
    cos, sin = table(100, dim)
    rest = (cos, sin, bounds(lengths), max(lengths))
    out = rope_attention(qkv, *rest, table_offsets=offsets, scale=0.3, backend=backend)
    twin = rope_attention(exact, *rest, table_offsets=offsets, scale=0.3, backend="reference")
    out.backward(grad.to(dtype))
    twin.backward(grad.to(dtype).double())
    assert relative_error(out.detach(), twin.detach()) < 2 * TOLERANCE[dtype]
    # Slack for gradients that nearly cancel: one-token sequences have none but the value's.
    limit = (1e-5 if dtype == torch.float32 else 1.5e-2) * (1 + grad.norm().item())
    assert (qkv.grad.double() - exact.grad).norm().item() <= limit


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("groups", "queries", "dim"), [(2, 2, 32), (1, 1, 64), (8, 2, 128), (2, 6, 96), (1, 8, 16), (3, 5, 48)]
)
def test_decode_against_float64(backend, dtype, groups, queries, dim):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 513, 0, 600, 37], dtype=torch.int32)
    q = torch.randn(5, groups * queries, dim, generator=draw).to(dtype)
    # A view of a larger cache, as a generator that grows its cache in steps uses it; the rest is poisoned.
    k_cache, v_cache = torch.full((2, 5, groups, 640, dim), float("nan"), dtype=dtype)
    expected = torch.zeros(5, groups * queries, dim, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        k_cache[row, :, :length] = torch.randn(groups, length, dim, generator=draw).to(dtype)
        v_cache[row, :, :length] = torch.randn(groups, length, dim, generator=draw).to(dtype)
        if length:
            keys, values = (x[row, :, :length].double().repeat_interleave(queries, 0) for x in (k_cache, v_cache))
            weights = (torch.einsum("hd,hld->hl", q[row].double(), keys) / dim**0.5).softmax(-1)
            expected[row] = torch.einsum("hl,hld->hd", weights, values)
    if backend == "sdpa":  # torch multiplies masked values by 0
        k_cache, v_cache = k_cache.nan_to_num(0.0), v_cache.nan_to_num(0.0)
    out = decode_attention(q, k_cache[:, :, :600], v_cache[:, :, :600], lengths, backend=backend)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert torch.equal(out[2], torch.zeros_like(out[2]))


def wrong_calls():
    qkv, (cos, sin) = packed([10], 2, 2, 32, torch.float32), table(16, 32)
    good = {"qkv": qkv, "cos": cos, "sin": sin, "cu_seqlens": bounds([10]), "max_seqlen": 10}
    offsets = torch.tensor([7], dtype=torch.int32)
    yield {**good, "qkv": qkv[0]}, "qkv must be"
    yield {**good, "qkv": qkv[..., :31]}, "qkv must be"
    yield {**good, "qkv": qkv.int()}, "floating point"
    yield {**good, "cos": cos.double()}, "cos must be float32"
    yield {**good, "sin": sin[:, :8]}, "sin must be float32"
    yield {**good, "sin": sin[:8]}, "sin must be float32"
    yield {**good, "cu_seqlens": bounds([10]).long()}, "cu_seqlens must be int32"
    yield {**good, "cu_seqlens": bounds([9])}, "rise from 0"
    yield {**good, "cu_seqlens": torch.tensor([0, 12, 10], dtype=torch.int32)}, "rise from 0"
    yield {**good, "cu_seqlens": torch.tensor([-2, 10], dtype=torch.int32)}, "rise from 0"
    yield {**good, "max_seqlen": 9}, "longest sequence"
    yield {**good, "table_offsets": offsets}, "needs? 17|need 17"
    yield {**good, "table_offsets": -offsets}, "negative"
    yield {**good, "table_offsets": offsets.long()}, "table_offsets must be int32"
    yield {**good, "cos": cos[:9], "sin": sin[:9]}, "table has 9 rows"
    yield {**good, "backend": "fast"}, "does not exist"
    yield {**good, "backend": "flash_attn"}, "CUDA only"


@pytest.mark.parametrize(("arguments", "message"), list(wrong_calls()))
def test_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        rope_attention(**arguments)


def wrong_decodes():
    q, cache, lengths = torch.zeros(2, 4, 32), torch.zeros(2, 2, 8, 32), torch.tensor([1, 8], dtype=torch.int32)
    yield (q[0], cache, cache, lengths), "takes q"
    yield (q, cache, cache[:, :1], lengths), "takes q"
    yield (q[:1], cache, cache, lengths), "does not fit"
    yield (q[:, :3], cache, cache, lengths), "does not fit"
    yield (q, cache.bfloat16(), cache.bfloat16(), lengths), "share one floating dtype"
    yield (q, cache, cache, lengths.long()), "lengths must be int32"
    yield (q, cache, cache, lengths + 1), "lie in 0..8"


@pytest.mark.parametrize(("arguments", "message"), list(wrong_decodes()))
def test_decode_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments)


def test_backend_is_named():
    chosen = select_backend("cpu", torch.bfloat16, 128)
    assert chosen in ("native", "sdpa")
    assert chosen in describe_backend("cpu", torch.bfloat16, 128)
    assert select_backend("cpu", torch.float64, 128) == "reference"
