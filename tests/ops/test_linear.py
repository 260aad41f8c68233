"""The linear layer is nn.Linear in everything but the library that multiplies."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from internlm2.ops import Linear, extension, processor
from internlm2.ops import linear as linear_module


@pytest.fixture(params=["onednn", "plain"])
def path(request, monkeypatch):
    """Both paths wherever torch has oneDNN at all: the processor's vendor decides only which one is the default."""
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(linear_module, "onednn_float32", lambda: request.param == "onednn")
    return request.param


@pytest.mark.parametrize("shape", [(64, 48), (3, 40, 48), (31, 48), (1, 48), (0, 48), (48,)])
def test_values_and_gradients_equal_exact_product(path, shape):
    draw = torch.Generator().manual_seed(0)
    layer = Linear(48, 72, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(72, 48, generator=draw))
    x = torch.randn(shape, generator=draw).requires_grad_()
    grad = torch.randn(*shape[:-1], 72, generator=draw)
    layer(x).backward(grad)
    weight, exact = layer.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    (exact @ weight.t()).backward(grad.double())
    assert torch.allclose(layer(x).double(), exact @ weight.t(), atol=1e-5)
    assert torch.allclose(x.grad.double(), exact.grad, atol=1e-5)
    assert torch.allclose(layer.weight.grad.double(), weight.grad, atol=1e-4)


def test_onednn_is_really_taken(path):
    layer, x = Linear(48, 72, bias=False), torch.ones(64, 48)
    assert ("OneDNN" in type(layer(x).grad_fn).__name__) == (path == "onednn")
    assert "OneDNN" not in type(layer.bfloat16()(x.bfloat16()).grad_fn).__name__


def test_strided_input_frozen_weight_and_frozen_input(path):
    layer = Linear(48, 72, bias=False)
    wide = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    x = wide[:, ::2].requires_grad_()
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.allclose(x.grad[0], layer.weight.sum(0), atol=1e-4)
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert torch.allclose(layer.weight.grad[0], x.detach().sum(0), atol=1e-4)


def test_state_dict_is_that_of_nn_linear():
    ours, plain = Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours(torch.ones(8)), plain(torch.ones(8)))


def test_wrong_width_is_torchs_own_error(path):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Linear(48, 72, bias=False)(torch.ones(64, 50))


def test_self_check_rejects_wrong_numbers(monkeypatch):
    monkeypatch.setattr(linear_module, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(linear_module, "_product", lambda a, b: (a @ b.t()) * 1.001)
    linear_module.onednn_float32.cache_clear()
    assert linear_module.onednn_float32() is False
    linear_module.onednn_float32.cache_clear()


@pytest.mark.skipif(not extension.load_cpu(), reason="needs the CPU kernels")
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), inputs=st.integers(1, 200), outputs=st.integers(1, 140), seed=st.integers(0, 2**20))
def test_few_rows_in_bfloat16(rows, inputs, outputs, seed):
    draw = torch.Generator().manual_seed(seed)
    layer = Linear(inputs, outputs, bias=False).bfloat16()
    x = torch.randn(rows, inputs, generator=draw).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=draw))
        y = layer(x)
    exact = x.double() @ layer.weight.detach().double().t()
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).norm() <= 4e-3 * exact.norm()).item()
    if rows > 1:  # a row's bits do not depend on its neighbours' values
        with torch.no_grad():
            x[1:] = float("nan")
            assert torch.equal(layer(x)[0], y[0])


def test_few_rows_with_gradient_keep_autograd():
    layer = Linear(32, 16, bias=False).bfloat16()
    assert layer(torch.ones(2, 32, dtype=torch.bfloat16)).requires_grad


MEASURE = """
import ctypes
import torch
from internlm2.ops import linear

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d e f g used h i".split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
torch.set_num_threads(1)
weight, grad, x = torch.randn(128, 344), torch.randn(400, 128), torch.randn(400, 344)
for rows in range(40, 400):
    linear._product(x[:rows], weight)
    linear._product(grad[:rows], weight.t())
    linear._product(grad[:rows].t(), x[:rows].t())
    if rows in (100, 399):
        print(mallinfo2().used)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's count of what is in use")
def test_products_of_ever_new_sizes_do_not_fill_memory():
    """Packed batches have another number of rows each; unbounded, these thousand products would keep 340 MB."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    early, late = map(int, done.stdout.split())
    assert late - early < 10e6


@pytest.fixture
def slow_bfloat16(monkeypatch):
    """As on a processor without bfloat16 instructions."""
    monkeypatch.setattr(processor, "bfloat16_is_slow", lambda: True)


@pytest.mark.parametrize("shape", [(64, 48), (3, 40, 48), (1, 48), (0, 48), (48,)])
def test_widened_bfloat16_rounds_each_exact_product_once(slow_bfloat16, shape):
    draw = torch.Generator().manual_seed(0)
    layer = Linear(48, 72, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(72, 48, generator=draw))
    x = torch.randn(shape, generator=draw).bfloat16().requires_grad_()
    grad = torch.randn(*shape[:-1], 72, generator=draw).bfloat16()
    y = layer(x)
    assert "Widened" in type(y.grad_fn).__name__
    y.backward(grad)
    weight, exact = layer.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    (exact @ weight.t()).backward(grad.double())
    for found, wanted in ((y, exact @ weight.t()), (x.grad, exact.grad), (layer.weight.grad, weight.grad)):
        assert found.dtype == torch.bfloat16
        # Half a step of bfloat16, and float32's own error where large terms cancel.
        assert ((found.double() - wanted).abs() <= wanted.abs() * 2.0**-8 + 1e-5).all()


def test_widened_bfloat16_leaves_frozen_weights_alone(slow_bfloat16):
    layer, x = Linear(48, 72, bias=False).bfloat16(), torch.ones(64, 48, dtype=torch.bfloat16, requires_grad=True)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_other_products_are_not_widened(slow_bfloat16):
    assert "Widened" not in type(Linear(48, 72, bias=False)(torch.ones(64, 48)).grad_fn).__name__
    assert "float32" in processor.describe_products("cpu", torch.bfloat16)
    assert "float32" not in processor.describe_products("cuda", torch.bfloat16)
