"""On a GPU: first each primitive against its emulation, then the kernels' own cases against float64.

Run with `pytest -m gpu tests/csrc` after `pip install -e . --no-build-isolation`. The first part says whether the
emulation, on which every other test here rests, describes the hardware.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import emulation_build
import numpy as np
import pytest
import torch
from cuda_cases import (
    ATTENTION_CASES,
    DECODE_CASES,
    LINEAR_CASES,
    AttentionCase,
    DecodeCase,
    LinearCase,
    relative_error,
)
from primitive_probe import SOURCE, Probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LIBRARY = emulation_build.REPOSITORY / "internlm2" / "ops" / "libinternlm2_cuda.so"
# Approximate on hardware (2 units in the last place, PTX manual), or dependent on the order of summation.
APPROXIMATE = {"exponentials": 1e-6, "mma_bf16": 1e-5}
PRIMITIVES = (
    "mma_bf16",
    "ldmatrix",
    "ldmatrix_transposed",
    "cp_async",
    "bf16_pairs",
    "bf16_scalars",
    "exponentials",
    "byte_permutation",
    "shuffles",
    "streaming_load",
)


def random_words(name: str, seed: int) -> np.ndarray:
    """[32, 12] registers that make sense to the primitive: floats where it reads floats, else any bits."""
    random = np.random.default_rng(seed)
    floats = random.standard_normal((32, 12)).astype(np.float32)
    bits = random.integers(0, 2**32, (32, 12), dtype=np.uint32)
    halves = torch.from_numpy(random.standard_normal((32, 24)).astype(np.float32)).bfloat16().view(torch.int16)
    pairs = halves.numpy().view(np.uint32)
    if name == "mma_bf16":
        return np.concatenate([pairs[:, :6], floats.view(np.uint32)[:, :4]], axis=1)
    if name == "bf16_pairs":
        return np.concatenate([floats.view(np.uint32)[:, :2], pairs[:, :2]], axis=1)
    if name == "exponentials":
        return np.stack([floats[:, 0] * 20, np.abs(floats[:, 1]) + 1e-3], axis=1).view(np.uint32)
    if name in ("bf16_scalars", "shuffles"):
        return np.concatenate([floats.view(np.uint32)[:, :1], bits[:, :2]], axis=1)
    if name.startswith("ldmatrix"):  # every lane must shift by the same number of rows
        return np.concatenate([bits[:, :4], np.full((32, 1), bits[0, 0] % 4 * 8, dtype=np.uint32)], axis=1)
    return bits


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Probe, Probe]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc to compile the primitives for the GPU")
    library = tmp_path_factory.mktemp("probe") / "probe.so"
    command = [
        nvcc,
        "-O3",
        "-std=c++17",
        "-arch=native",
        "-shared",
        "-Xcompiler=-fPIC",
        str(SOURCE),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return Probe(library), Probe(emulation_build.build_plain(SOURCE))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive_does_on_the_gpu_what_its_emulation_does(probes: tuple[Probe, Probe], name: str) -> None:
    gpu, emulated = probes
    for seed in range(20):
        words = random_words(name, seed)
        actual, expected = gpu(name, words), emulated(name, words)
        if name in APPROXIMATE:
            tolerance = APPROXIMATE[name]
            np.testing.assert_allclose(
                actual.view(np.float32), expected.view(np.float32), rtol=tolerance, atol=tolerance
            )
        else:
            np.testing.assert_array_equal(actual, expected)


@pytest.fixture(scope="module")
def ops():
    pytest.importorskip("internlm2.ops.schemas", reason="needs the operator schemas of internlm2.ops")
    if not Path(LIBRARY).is_file():
        pytest.skip("needs libinternlm2_cuda.so: pip install -e . --no-build-isolation on a machine with nvcc")
    torch.ops.load_library(str(LIBRARY))
    return torch.ops.internlm2


def on_gpu(arguments: tuple) -> list:
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES.keys())
def test_attention(ops, case: AttentionCase) -> None:
    qkv, *table = on_gpu(case.forward_arguments())
    out, lse = ops.rope_attention_forward(qkv, *table)
    expected_out, expected_lse, expected_grad = case.reference()
    assert relative_error(out.cpu(), expected_out) < 5e-3
    assert (lse.cpu() - expected_lse).abs().max() < 2e-2
    grad = ops.rope_attention_backward(case.grad_out.cuda(), qkv, out, lse, *table)
    assert relative_error(grad.cpu(), expected_grad) < 1e-2
    for _ in range(3):  # no atomics: the same bits each time
        assert torch.equal(ops.rope_attention_backward(case.grad_out.cuda(), qkv, out, lse, *table), grad)


@pytest.mark.parametrize("case", DECODE_CASES.values(), ids=DECODE_CASES.keys())
def test_decode(ops, case: DecodeCase) -> None:
    out = ops.decode_attention(*on_gpu(case.arguments())).cpu()
    assert relative_error(out, case.reference()) < 5e-3


@pytest.mark.parametrize("case", LINEAR_CASES.values(), ids=LINEAR_CASES.keys())
def test_quantized_linear(ops, case: LinearCase) -> None:
    y = ops.quantized_linear(*on_gpu(case.arguments())).cpu()
    assert relative_error(y, case.reference()) < (1e-4 if case.wide else 4e-3)
    weight = ops.dequantize_weight(*on_gpu(case.weight_arguments), True).cpu()
    assert torch.equal(weight, case.weight.float())


def test_attention_at_the_size_of_a_training_step(ops) -> None:
    """8192 tokens of InternLM2-7B's heads: longer than the emulation can go, against PyTorch's own attention."""
    case = AttentionCase((5000, 3192), groups=8, queries=4, dim=128)
    arguments = on_gpu(case.forward_arguments())
    out, _ = ops.rope_attention_forward(*arguments)
    start = 0
    for length in case.lengths:
        qkv = arguments[0][start : start + length].float()
        cos, sin = (x[:length, None].float() for x in arguments[1:3])

        def rotate(x: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
            low, high = x.chunk(2, dim=-1)
            return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

        q, k, v = rotate(qkv[:, :, :-2].flatten(1, 2)), rotate(qkv[:, :, -2]), qkv[:, :, -1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, scale=case.scale
        )
        assert relative_error(out[start : start + length], expected[0].transpose(0, 1).double()) < 6e-3
        start += length
