"""Each emulated warp instruction against a description of it that nobody here wrote, or against numpy.

The register layouts are CuTe's (NVIDIA CUTLASS, cute/atom/mma_traits_sm80.hpp and copy_traits_sm75.hpp): nested
(shape):(stride) pairs that send (lane, value) to a position in the matrix. The kernels and the emulation were written
from the PTX manual instead.
"""

import emulation_build
import numpy as np
import pytest
import torch
from primitive_probe import SOURCE, Probe

# (lane modes, value modes), each mode (size, stride), first mode fastest. Positions are column-major.
A_LAYOUT = (((4, 32), (8, 1)), ((2, 16), (2, 8), (2, 128)))  # index m + 16 k of A [16 x 16]
B_LAYOUT = (((4, 16), (8, 1)), ((2, 8), (2, 64)))  # index n + 8 k of B^T [8 x 16]
C_LAYOUT = (((4, 32), (8, 1)), ((2, 16), (2, 8)))  # index m + 16 n of C [16 x 8]
# Copies, in bits of the 32 rows of 128: SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T.
LDMATRIX_LAYOUT = (((32, 32),), ((32, 1), (4, 1024)))
LDMATRIX_TRANSPOSED_LAYOUT = (((4, 256), (8, 16)), ((16, 1), (2, 128), (4, 1024)))


def positions(layout: tuple) -> np.ndarray:
    """[lanes, values] of a CuTe thread-value layout."""

    def offsets(modes: tuple) -> np.ndarray:
        total = np.zeros(1, dtype=np.int64)
        for size, stride in modes:
            total = (np.arange(size)[:, None] * stride + total).reshape(-1)
        return total

    return offsets(layout[0])[:, None] + offsets(layout[1])


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe(emulation_build.build_plain(SOURCE))


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def words(halves: np.ndarray) -> np.ndarray:
    """[32, 2 n] 16-bit values, lower first, as [32, n] registers."""
    pairs = halves.astype(np.uint32).reshape(32, -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 16


def test_mma(probe: Probe, random: np.random.Generator) -> None:
    a, b, c = (random.integers(-8, 9, shape).astype(np.float64) for shape in ((16, 16), (8, 16), (16, 8)))
    registers = np.concatenate(
        [
            words(bf16_bits(a.flatten(order="F")[positions(A_LAYOUT)])),
            words(bf16_bits(b.flatten(order="F")[positions(B_LAYOUT)])),
            c.flatten(order="F")[positions(C_LAYOUT)].astype(np.float32).view(np.uint32),
        ],
        axis=1,
    )
    result = probe("mma_bf16", registers).view(np.float32)
    expected = (a @ b.T + c).flatten(order="F")[positions(C_LAYOUT)]
    assert np.array_equal(result, expected)


@pytest.mark.parametrize("shift", [0, 8, 24])
def test_ldmatrix(probe: Probe, random: np.random.Generator, shift: int) -> None:
    rows = random.integers(0, 2**32, (32, 4), dtype=np.uint32)
    inputs = np.concatenate([rows, np.full((32, 1), shift, dtype=np.uint32)], axis=1)
    pointed = np.roll(rows, -shift, axis=0).reshape(-1)  # lane l points at row l + shift
    bits = positions(LDMATRIX_LAYOUT).reshape(32, 4, 32)  # value modes: bit in a register, register
    assert np.array_equal(probe("ldmatrix", inputs), pointed[bits[:, :, 0] // 32])
    bits = positions(LDMATRIX_TRANSPOSED_LAYOUT).reshape(32, 8, 16)
    halves = pointed.view(np.uint16)[bits[:, :, 0] // 16]
    assert np.array_equal(probe("ldmatrix_transposed", inputs), words(halves))


def test_asynchronous_copies_bring_data_or_zeros(probe: Probe, random: np.random.Generator) -> None:
    inputs = random.integers(1, 2**32, (32, 6), dtype=np.uint32)
    out = probe("cp_async", inputs)
    source = np.roll(inputs, -1, axis=0)
    assert np.array_equal(out[:, :3], np.where(source[:, 4:5] % 2 == 0, source[:, [0, 1, 3]], 0))
    assert np.array_equal(out[:, 3], np.where(source[:, 4] % 4 < 2, source[:, 5], 0))


def test_bf16_rounding_is_torch_s(probe: Probe, random: np.random.Generator) -> None:
    values = random.standard_normal((32, 2)).astype(np.float32)
    values[:6, 0] = [np.inf, -np.inf, np.nan, 0.0, 1.00390625, 1.01171875]  # the last two are ties
    out = probe("bf16_scalars", values.view(np.uint32))
    ordinary = ~np.isnan(values[:, 0])
    assert np.array_equal(out[ordinary, 1], bf16_bits(values[ordinary, 0]))
    expected = torch.from_numpy(values[:, 0]).bfloat16().float().numpy()
    assert np.array_equal(out[:, 0].view(np.float32), expected, equal_nan=True)
    finite = np.nan_to_num(values, nan=1.0, posinf=2.0, neginf=-2.0)
    pairs = random.integers(0x3F00, 0x4300, (32, 4)).astype(np.uint32)  # bf16 between 0.5 and 128
    packed = words(pairs)
    out = probe("bf16_pairs", np.concatenate([finite.view(np.uint32), packed], axis=1))
    assert np.array_equal(out[:, :1], words(bf16_bits(finite)))
    as_float = (pairs << 16).astype(np.uint32).view(np.float32)
    assert np.array_equal(out[:, 1:3].view(np.float32), as_float[:, :2])
    assert np.array_equal(out[:, 3:], words(bf16_bits(as_float[:, :2] - as_float[:, 2:])))


def test_exponentials(probe: Probe, random: np.random.Generator) -> None:
    inputs = np.stack([random.uniform(-20, 5, 32), random.uniform(1e-3, 1e3, 32)], axis=1).astype(np.float32)
    inputs[0, 0] = -np.inf
    out = probe("exponentials", inputs.view(np.uint32)).view(np.float32)
    assert out[0, 0] == 0
    np.testing.assert_allclose(out[:, 0], np.exp2(inputs[:, 0]), rtol=1e-6)
    np.testing.assert_allclose(out[:, 1], np.log2(inputs[:, 1]), rtol=1e-6, atol=1e-6)


def test_byte_permutation_and_shuffles(probe: Probe, random: np.random.Generator) -> None:
    inputs = random.integers(0, 2**32, (32, 3), dtype=np.uint32)
    out = probe("byte_permutation", inputs)[:, 0]
    for lane in range(32):
        joined = inputs[lane, :2].tobytes()  # bytes of a, then of b
        picked = bytes(joined[int(inputs[lane, 2]) >> (4 * i) & 7] for i in range(4))
        assert out[lane].tobytes() == picked
    values = random.standard_normal((32, 1)).astype(np.float32).view(np.uint32)
    source = random.integers(0, 32, (32, 1)).astype(np.uint32)
    out = probe("shuffles", np.concatenate([values, source], axis=1))
    lanes = np.arange(32)
    for column, senders in enumerate((lanes ^ 1, lanes ^ 2, lanes ^ 16, source[:, 0])):
        assert np.array_equal(out[:, column], values[senders, 0])


@pytest.mark.slow
def test_portable_stack_switch(random: np.random.Generator) -> None:
    """Processors other than x86-64 switch fibers through ucontext; here it is chosen by hand."""
    probe = Probe(emulation_build.build_plain(SOURCE, ("-DEMULATION_UCONTEXT",)))
    values = random.standard_normal((32, 1)).astype(np.float32).view(np.uint32)
    assert np.array_equal(probe("shuffles", values)[:, 1], values[np.arange(32) ^ 2, 0])


def test_streaming_load(probe: Probe, random: np.random.Generator) -> None:
    inputs = random.integers(0, 2**32, (32, 4), dtype=np.uint32)
    assert np.array_equal(probe("streaming_load", inputs), inputs[np.arange(32) ^ 5])
