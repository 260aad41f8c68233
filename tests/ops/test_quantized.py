"""Quantised weights: the compiled operators against their twins bit for bit, and both against float64 products."""

import pytest
import torch
from attention_cases import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.ops import dequantize_weight, extension, quantize_weight, quantized_linear

BACKENDS = ["reference", *(["native"] if extension.load_cpu() else [])]
KINDS = [(4, True), (4, False), (8, True), (8, False)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_within_half_a_step(backend, bits, symmetric, dtype):
    weight = normal(40, 300, dtype=dtype) * 0.02
    weight[3, 128:256] = 0
    weight[5] = weight[5].abs()
    quantized = quantize_weight(weight, bits, symmetric, backend=backend)
    back = dequantize_weight(quantized, torch.float32, backend=backend)
    assert back.shape == weight.shape
    for column in range(0, 300, 128):
        part, error = weight[:, column : column + 128].float(), (back - weight.float())[:, column : column + 128].abs()
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        furthest = torch.maximum(high, -low)
        if symmetric:
            step = furthest / (8 if bits == 4 else 127)
            # The extreme of the shorter side may clip where it nearly equals the longer one: a whole step.
            slack = step if bits == 4 else step / 2
        else:
            step = (high - low) / (15 if bits == 4 else 255)
            slack = step  # half for the weight, half for the zero point
        assert (error.amax(1) <= slack * 1.02 + 1e-9).all()
    assert torch.equal(back[3, 128:256], torch.zeros(128))


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_fewer_bytes(bits, symmetric):
    weight = normal(256, 512, dtype=torch.bfloat16)
    assert quantize_weight(weight, bits, symmetric).nbytes <= weight.nbytes * bits / 16 * 1.06


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the CPU kernels")
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 2**20),
)
def test_kernels_equal_their_twins_bit_for_bit(rows, columns, kind, dtype, size, seed):
    weight = (normal(rows, columns, seed=seed) * size).to(dtype)
    native, twin = (quantize_weight(weight, *kind, backend=name) for name in ("native", "reference"))
    assert torch.equal(native.packed, twin.packed)
    assert torch.equal(native.scales, twin.scales)
    assert torch.equal(native.zeros, twin.zeros)
    for wide in (torch.float32, torch.bfloat16):
        ours, theirs = (dequantize_weight(native, wide, backend=name) for name in ("native", "reference"))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("act_bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 256), (7, 100), (2, 9, 384), (131, 130), (0, 128)])
def test_product_against_float64(backend, bits, symmetric, act_bits, dtype, shape):
    weight = quantize_weight(normal(75, shape[-1]) * 0.05, bits, symmetric)
    x = normal(*shape, seed=1, dtype=dtype) + 0.3  # a mean, so that a forgotten zero point shows
    y = quantized_linear(x, weight, act_bits, backend=backend)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], 75)
    exact = x.double() @ dequantize_weight(weight, torch.float32).double().t()
    # int8 activations cost 0.5 % of their largest value, bfloat16 ones 0.2 % of each.
    assert relative_error(y, exact) < (0.012 if act_bits == 8 else 0.004)


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the CPU kernels")
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 400),
    kind=st.sampled_from(KINDS),
    act_bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**20),
)
def test_product_agrees_with_twin(tokens, outputs, inputs, kind, act_bits, seed):
    """The same codes for weights and activations, so only the order of float32 sums differs.

    With int8 activations a code may also differ by one, where x * 127 / largest lies within float32's rounding of a tie
    (the kernel's product may be fused): one such code in a row of 216 moves its result by 3e-4, truncation by 5e-3.
    """
    weight = quantize_weight(normal(outputs, inputs, seed=seed), *kind)
    x = normal(tokens, inputs, seed=seed + 1)
    ours, twin = (quantized_linear(x, weight, act_bits, backend=name) for name in ("native", "reference"))
    assert relative_error(ours, twin) < (2e-3 if act_bits == 8 else 2e-5)


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the CPU kernels")
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_largest_codes_do_not_overflow(bits, symmetric, sign):
    """Rows of the lowest code, of the highest, and of both, times activations that all round to 127 or -127.

    Where bytes are multiplied in pairs, such sums come closest to the end of 16 bits: 2 x 128 x 127, 16 x 15 x 127.
    """
    weight = torch.ones(32, 256)
    weight[:8], weight[8:16, ::2], weight[16:24, 1::3] = -1.0, -1.0, 0.5
    weight[:, 0], weight[:, 128] = -1.0, -1.0  # so that each group's range is the whole one
    quantized = quantize_weight(weight, bits, symmetric)
    x = torch.full((5, 256), sign * 127.0)
    exact = x.double() @ dequantize_weight(quantized, torch.float32).double().t()
    for rows in (1, 2, 3, 5):
        y = quantized_linear(x[:rows], quantized, 8, backend="native")
        assert torch.allclose(y.double(), exact[:rows], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_to_input(backend, dtype):
    weight = quantize_weight(normal(48, 160), 4, False)
    x, grad = normal(3, 5, 160, dtype=dtype).requires_grad_(), normal(3, 5, 48, seed=2, dtype=dtype)
    quantized_linear(x, weight, backend=backend).backward(grad)
    exact = grad.double() @ dequantize_weight(weight, torch.float32).double()
    assert relative_error(x.grad, exact) < (1e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_never_hidden(backend):
    weight = normal(16, 256)
    weight[2, 130] = float("inf")
    weight[3, 0] = float("nan")
    quantized = quantize_weight(weight, 4, True, backend=backend)
    back = dequantize_weight(quantized, torch.float32, backend=backend)
    assert back[2, 128:].isnan().all()
    assert back[3, :128].isnan().all()
    assert back[2, :128].isfinite().all()
    x = normal(4, 256)
    x[1, 7] = float("nan")
    sound = quantize_weight(normal(16, 256), 4, True)
    for act_bits in (8, 16):
        y = quantized_linear(x, sound, act_bits, backend=backend)
        assert y[1].isnan().all()
        assert y[[0, 2, 3]].isfinite().all()


def wrong_calls():
    weight = quantize_weight(normal(32, 128))
    yield lambda: quantize_weight(normal(32, 128), bits=3), "bits must be 4 or 8"
    yield lambda: quantize_weight(normal(32)), "out_features, in_features"
    yield lambda: quantize_weight(normal(32, 128).double()), "bfloat16 or float32"
    yield lambda: quantized_linear(normal(2, 127), weight), r"x must be \[..., 128\]"
    yield lambda: quantized_linear(normal(2, 128), weight, act_bits=4), "act_bits must be 8 or 16"
    yield lambda: quantized_linear(normal(2, 128).half(), weight), "x must be bfloat16 or float32"
    yield lambda: dequantize_weight(weight, torch.float16), "not torch.float16"


@pytest.mark.parametrize(("call", "message"), list(wrong_calls()))
def test_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
