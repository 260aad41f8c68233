"""The compiled operators as torch operators: schema, shapes, autograd, compilation, determinism, errors."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import bounds, packed, table

from internlm2.ops import decode_attention, extension, quantize_weight, quantized_linear, rope_attention, select_backend

pytestmark = pytest.mark.skipif(not extension.load_cpu(), reason="needs the CPU kernels")
ops = torch.ops.internlm2


def rope_case(dtype=torch.bfloat16, dim=32, lengths=(20, 0, 7)):
    lengths = list(lengths)
    cos, sin = table(64, dim)
    offsets = torch.arange(len(lengths), dtype=torch.int32)
    return packed(lengths, 2, 3, dim, dtype), cos, sin, bounds(lengths), offsets, max(lengths), 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck_rope_attention(dtype):
    qkv, *rest = rope_case(dtype)
    torch.library.opcheck(ops.rope_attention_forward, (qkv.requires_grad_(), *rest), atol=1e-2, rtol=1e-2)
    out, lse = ops.rope_attention_forward(qkv.detach(), *rest)
    torch.library.opcheck(ops.rope_attention_backward, (torch.ones_like(out), qkv.detach(), out, lse, *rest))


def test_opcheck_decode_attention():
    cache = torch.ones(2, 2, 9, 32)
    torch.library.opcheck(
        ops.decode_attention, (torch.ones(2, 4, 32), cache, cache, torch.tensor([3, 9], dtype=torch.int32), 0.1)
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck_quantized(bits, symmetric):
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(ops.quantize_weight, (weight, bits, symmetric))
    parts = (*ops.quantize_weight(weight, bits, symmetric), bits, 40, 200)
    torch.library.opcheck(ops.dequantize_weight, (*parts, True))
    torch.library.opcheck(ops.quantized_linear, (torch.ones(3, 200, requires_grad=True), *parts, 16))


def test_opcheck_few_rows_linear():
    torch.library.opcheck(ops.few_rows_linear, (torch.ones(3, 40).bfloat16(), torch.ones(7, 40).bfloat16()))


def test_compiles_without_graph_breaks():
    qkv, cos, sin, cu_seqlens, *_ = rope_case()

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        return rope_attention(qkv * 2, cos, sin, cu_seqlens, 20, backend="native").sum()

    graph = torch.compile(attend, fullgraph=True, backend="aot_eager")
    plain, compiled = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    attend(plain).backward()
    graph(compiled).backward()
    assert torch.equal(plain.grad, compiled.grad)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_do_not_depend_on_run_or_threads(threads, dtype):
    """Longer than a chunk of the backward pass, so that few sequences take its other way to share the work."""
    before = torch.get_num_threads()
    qkv, cos, sin = packed([1700, 3], 1, 2, 16, dtype), *table(1700, 16)
    grad = torch.randn(1703, 2, 16, generator=torch.Generator().manual_seed(2)).to(dtype)

    def both():
        x = qkv.clone().requires_grad_()
        out = rope_attention(x, cos, sin, bounds([1700, 3]), 1700, backend="native")
        out.backward(grad)
        return out.detach(), x.grad

    try:
        torch.set_num_threads(1)
        expected = both()
        torch.set_num_threads(threads)
        for _ in range(3):
            assert all(torch.equal(ours, first) for ours, first in zip(both(), expected))
    finally:
        torch.set_num_threads(before)


def test_strided_input_needs_no_copy():
    qkv, *rest = rope_case()
    wide = torch.zeros(27, 2, 8, 64, dtype=qkv.dtype)
    view = wide[:, :, 1:6, 16:48]
    view.copy_(qkv)
    assert torch.equal(ops.rope_attention_forward(view, *rest)[0], ops.rope_attention_forward(qkv, *rest)[0])


def test_nan_is_never_hidden():
    lengths = [20, 30]
    for part in (0, 3, 4):  # a query, a key, a value
        qkv = packed(lengths, 1, 3, 32, torch.bfloat16)
        qkv[25, 0, part, 3] = float("nan")
        cos, sin = table(30, 32)
        out = rope_attention(qkv, cos, sin, bounds(lengths), 30, backend="native")
        assert out[:20].isfinite().all()  # the other sequence
        assert out[25].isnan().any()


def wrong_rope_calls():
    qkv, cos, sin, cu_seqlens, offsets, longest, scale = rope_case()
    good = {
        "qkv": qkv,
        "cos": cos,
        "sin": sin,
        "cu": cu_seqlens,
        "offsets": offsets,
        "longest": longest,
        "scale": scale,
    }
    yield {**good, "qkv": qkv.half()}, "bfloat16 or float32"
    yield {**good, "qkv": qkv[0]}, r"must be \[tokens"
    yield {**good, "qkv": qkv[..., :24]}, "multiple of 16"
    yield {**good, "qkv": qkv.transpose(0, 3)}, "multiple of 16|contiguous"
    yield {**good, "cos": cos.t().contiguous().t()}, "cos must be a contiguous"
    yield {**good, "sin": sin.double()}, "sin must be a contiguous float32"
    yield {**good, "sin": sin[:9]}, "cos and sin must be"
    yield {**good, "cu": cu_seqlens.long()}, "cu_seqlens must be a contiguous int32"
    yield {**good, "cu": bounds([20, 0, 8])}, "rise from 0"
    yield {**good, "cu": torch.tensor([0, 15, 10, 27], dtype=torch.int32)}, "falls after sequence 1"
    yield {**good, "longest": 19}, "sequence 0 has 20 tokens"
    yield {**good, "offsets": offsets + 60}, "build a longer table"
    yield {**good, "offsets": offsets - 1}, "build a longer table"
    yield {**good, "offsets": offsets[:2]}, "one a sequence"


@pytest.mark.parametrize(("arguments", "message"), list(wrong_rope_calls()))
def test_operator_checks_before_it_reads(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.rope_attention_forward(*arguments.values())


def test_other_operators_check_before_they_read():
    cache, lengths = torch.ones(2, 2, 9, 32), torch.tensor([3, 9], dtype=torch.int32)
    q = torch.ones(2, 4, 32)
    with pytest.raises(RuntimeError, match=r"does not lie in 0\.\.9"):
        ops.decode_attention(q, cache, cache, lengths + 1, 0.1)
    with pytest.raises(RuntimeError, match="kv heads do not divide"):
        ops.decode_attention(q[:, :3].contiguous(), cache, cache, lengths, 0.1)
    with pytest.raises(RuntimeError, match="caches must be"):
        ops.decode_attention(q, cache, cache.bfloat16(), lengths, 0.1)
    packed_, scales, zeros = ops.quantize_weight(torch.ones(32, 256), 4, False)
    with pytest.raises(RuntimeError, match="are not a weight of 64 x 256"):
        ops.quantized_linear(torch.ones(1, 256), packed_, scales, zeros, 4, 64, 256, 16)
    with pytest.raises(RuntimeError, match="are not a weight"):
        ops.dequantize_weight(packed_, scales, zeros, 8, 32, 256, True)
    with pytest.raises(RuntimeError, match="act_bits must be 8 or 16"):
        ops.quantized_linear(torch.ones(1, 256), packed_, scales, zeros, 4, 32, 256, 4)


CHECK = """
import torch
from internlm2.ops import select_backend
from internlm2.ops.extension import instruction_set
print(instruction_set(), select_backend("cpu", torch.float32, 64))
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_passes_the_same_tests(name):
    probe = python(CHECK, INTERNLM2_CPU_ISA=name)
    if probe.returncode:
        pytest.skip(f"{name} does not run here")
    assert probe.stdout.split() == [name, "native"]
    folder = os.path.dirname(__file__)
    tests = [os.path.join(folder, f"test_{room}.py") for room in ("attention", "quantized", "decoder")]
    run = python(
        f"import pytest, sys; sys.exit(pytest.main({['-x', '-q', '-p', 'no:cacheprovider', *tests]!r}))",
        INTERNLM2_CPU_ISA=name,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_without_the_library_everything_runs_with_one_warning():
    code = """
import pathlib, warnings, torch
from internlm2.ops import extension
extension.FOLDER = pathlib.Path("/nonexistent")
from internlm2.ops import decode_attention, quantize_weight, quantized_linear, rope_attention, select_backend
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert select_backend("cpu", torch.float32, 32) == "sdpa"
    table = torch.ones(8, 16)
    rope_attention(torch.ones(8, 1, 3, 32), table, table, torch.tensor([0, 8], dtype=torch.int32), 8)
    cache = torch.ones(1, 1, 4, 32)
    decode_attention(torch.ones(1, 1, 32), cache, cache, torch.tensor([2], dtype=torch.int32))
    quantized_linear(torch.ones(1, 128), quantize_weight(torch.ones(16, 128)))
print(len(seen), seen[0].message)
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("1 ")
    assert "pip install -e . --no-build-isolation" in run.stdout


def test_what_is_asked_for_but_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="not torch"):
        select_backend("cpu", torch.float64, 64, "native")
    with pytest.raises(ValueError, match="up to 256"):
        select_backend("cpu", torch.float32, 40, "native")
    assert select_backend("cpu", torch.float32, 40) == "sdpa"
    q = torch.ones(1, 1, 40)
    cache = torch.ones(1, 1, 3, 40)
    assert torch.equal(decode_attention(q, cache, cache, torch.tensor([3], dtype=torch.int32)), q)
    with pytest.raises(ValueError, match="backend 'fast'"):
        quantized_linear(torch.ones(1, 128), quantize_weight(torch.ones(16, 128)), backend="fast")
