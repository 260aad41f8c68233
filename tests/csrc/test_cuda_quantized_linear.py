"""The CUDA W4A16 and W8A16 products, executed by the emulation, against float64."""

import pytest
import torch
from cuda_cases import LINEAR_CASES, LinearCase, relative_error
from emulation_build import Emulation
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = pytest.mark.parametrize("case", LINEAR_CASES.values(), ids=LINEAR_CASES.keys())


def check(emulation: Emulation, case: LinearCase) -> None:
    packed = emulation.ops.quantized_pack_cuda(*case.pack_arguments)
    y = emulation.ops.quantized_linear_cuda(case.x, *packed, *case.shape)
    # The codes are exact in bf16 and sums are fp32: what is left is the rounding of the result, 2^-9 at most.
    assert relative_error(y, case.reference()) < 2.5e-3


@CASES
def test_matches_float64(scheduled: Emulation, case: LinearCase) -> None:
    check(scheduled, case)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 70),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 60).map(lambda n: 8 * n),
    bits=st.sampled_from((4, 8)),
    group=st.sampled_from((64, 128, 192)),
    asymmetric=st.booleans(),
    seed=st.integers(1, 2**20),
)
def test_ragged_shapes(emulation_session, rows, outputs, inputs, bits, group, asymmetric, seed) -> None:
    emulation_session.configure(seed=seed, copies=("lazy", "eager", "mixed")[seed % 3])
    check(emulation_session, LinearCase(rows, outputs, inputs, bits, group, asymmetric, seed))


@CASES
def test_dequantized_weight_is_the_rounded_one(emulation: Emulation, case: LinearCase) -> None:
    packed = emulation.ops.quantized_pack_cuda(*case.pack_arguments)
    dense = emulation.ops.dequantize_cuda(*packed, *case.shape)
    assert torch.equal(dense, case.weight().float().bfloat16())


def test_many_rows_take_the_dense_product(emulation: Emulation) -> None:
    case = LinearCase(257, 24, 128)
    packed = emulation.ops.quantized_pack_cuda(*case.pack_arguments)
    emulation.reset_counters()
    y = emulation.ops.quantized_linear_cuda(case.x, *packed, *case.shape)
    assert emulation.counters().mma == 0
    assert relative_error(y, case.reference()) < 5e-3  # the weight is rounded to bf16 here


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("outputs", [0, 4])
def test_empty(emulation: Emulation, rows: int, outputs: int) -> None:
    case = LinearCase(rows, outputs, 64)
    packed = emulation.ops.quantized_pack_cuda(*case.pack_arguments)
    y = emulation.ops.quantized_linear_cuda(case.x, *packed, *case.shape)
    assert y.shape == (rows, outputs)


def test_the_order_of_threads_does_not_change_a_bit(emulation: Emulation) -> None:
    case = LINEAR_CASES["sixteen rows, 8 bit"]
    results = []
    for seed in range(3):
        emulation.configure(seed=seed, copies="mixed")
        packed = emulation.ops.quantized_pack_cuda(*case.pack_arguments)
        results.append(emulation.ops.quantized_linear_cuda(case.x, *packed, *case.shape))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [16, 64])
def test_shared_memory_is_free_of_bank_conflicts(emulation: Emulation, bits: int, rows: int) -> None:
    case = LinearCase(rows, 128, 512, bits=bits)
    packed = emulation.ops.quantized_pack_cuda(*case.pack_arguments)
    emulation.reset_counters()
    emulation.ops.quantized_linear_cuda(case.x, *packed, *case.shape)
    counters = emulation.counters()
    assert counters.ldmatrix >= 100
    assert counters.ldmatrix_wavefronts == 4 * counters.ldmatrix
    assert counters.shared_wavefronts == counters.shared_ideal


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 128), "x must be bfloat16"),
        (0, torch.zeros(2, 120, dtype=torch.bfloat16), "x must be \\[rows, 128\\], got \\[2, 120\\]"),
        (1, torch.zeros(64, dtype=torch.uint8), "not those of a packed \\[16, 128\\] weight"),
        (6, 3, "4 or 8 bits, got 3"),
        (7, 96, "multiple of 64 inputs, got 96"),
        (5, 129, "multiple of 8 inputs, got 129"),
    ],
)
def test_wrong_arguments_are_named(emulation: Emulation, position: int, value, message: str) -> None:
    case = LinearCase(2, 16, 128)
    arguments = [case.x, *emulation.ops.quantized_pack_cuda(*case.pack_arguments), *case.shape]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        emulation.ops.quantized_linear_cuda(*arguments)
