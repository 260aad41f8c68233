"""The CUDA W4A16 and W8A16 products, executed by the emulation, against float64."""

import pytest
import torch
from cuda_cases import LINEAR_CASES, LinearCase, relative_error
from emulation_build import Emulation
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = pytest.mark.parametrize("case", LINEAR_CASES.values(), ids=LINEAR_CASES.keys())


def assert_matches(emulation: Emulation, case: LinearCase) -> None:
    y = emulation.ops.quantized_linear(*case.arguments())
    assert y.dtype == case.x.dtype
    expected = case.reference()
    # The codes are exact in bf16 and sums are fp32: what is left is fp32 summation and, in bf16, rounding the result.
    summation = 1e-6 * (case.x.bfloat16().double().abs() @ case.weight.abs().t())
    rounding = 0.0 if case.wide else 2**-8 * expected.abs()
    assert ((y.double() - expected).abs() <= summation + rounding).all()


@CASES
def test_matches_float64(scheduled: Emulation, case: LinearCase) -> None:
    assert_matches(scheduled, case)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 70),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 60).map(lambda n: 8 * n),
    bits=st.sampled_from((4, 8)),
    asymmetric=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(1, 2**20),
)
def test_ragged_shapes(emulation_session, rows, outputs, inputs, bits, asymmetric, wide, seed) -> None:
    emulation_session.configure(seed=seed, copies=("lazy", "eager", "mixed")[seed % 3])
    assert_matches(emulation_session, LinearCase(rows, outputs, inputs, bits, asymmetric, wide, seed))


@CASES
def test_dequantized_weight_is_the_rounded_one(emulation: Emulation, case: LinearCase) -> None:
    exact = case.weight.float()  # a code of at most 9 bits times 8 bits of scale
    assert torch.equal(emulation.ops.dequantize_weight(*case.weight_arguments, True), exact)
    assert torch.equal(emulation.ops.dequantize_weight(*case.weight_arguments, False), exact.bfloat16())


@pytest.mark.parametrize(
    "case",
    [LinearCase(257, 24, 128), LinearCase(4, 24, 130), LinearCase(4, 24, 133, wide=True)],
    ids=["many rows", "rows that start at odd places", "odd inputs, float32"],
)
def test_what_the_kernel_does_not_take_goes_through_the_dense_product(emulation: Emulation, case: LinearCase) -> None:
    y = emulation.ops.quantized_linear(*case.arguments())
    assert emulation.counters().mma == 0
    assert relative_error(y, case.reference()) < 5e-3  # the weight is rounded to bf16 here


@pytest.mark.parametrize(("rows", "outputs"), [(0, 4), (4, 0), (0, 0)])
def test_empty(emulation: Emulation, rows: int, outputs: int) -> None:
    y = emulation.ops.quantized_linear(*LinearCase(rows, outputs, 64).arguments())
    assert y.shape == (rows, outputs)


def test_leading_dimensions_are_kept(emulation: Emulation) -> None:
    case = LinearCase(6, 20, 128)
    y = emulation.ops.quantized_linear(case.x.view(2, 3, 128), *case.arguments()[1:])
    assert torch.equal(y.view(6, 20), emulation.ops.quantized_linear(*case.arguments()))


def test_a_poisoned_group_gives_nan_in_its_outputs_alone(emulation: Emulation) -> None:
    case = LinearCase(3, 20, 256)
    x, packed, scales, *rest = case.arguments()
    scales[0, 1, 5] = float("nan")
    y = emulation.ops.quantized_linear(x, packed, scales, *rest)
    assert y[:, 5].isnan().all()
    assert y[:, :5].isfinite().all()
    assert y[:, 6:].isfinite().all()


def test_the_order_of_threads_does_not_change_a_bit(emulation: Emulation) -> None:
    results = []
    for seed in range(3):
        emulation.configure(seed=seed, copies="mixed")
        results.append(emulation.ops.quantized_linear(*LINEAR_CASES["sixteen rows, 8 bit"].arguments()))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [16, 64])
def test_shared_memory_is_free_of_bank_conflicts(emulation: Emulation, bits: int, rows: int) -> None:
    case = LinearCase(rows, 128, 512, bits=bits, asymmetric=True)
    emulation.ops.quantized_linear(*case.arguments())
    counters = emulation.counters()
    assert counters.shared > 500
    assert counters.shared_wavefronts == counters.shared_ideal


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 128, dtype=torch.float64), "x must be bfloat16 or float32"),
        (0, torch.zeros(2, 120, dtype=torch.bfloat16), "x must be \\[..., 128\\], got \\[2, 120\\]"),
        (1, torch.zeros(64, dtype=torch.uint8), "not those of a \\[16, 128\\] weight of 4 bits"),
        (2, torch.zeros(1, 1, 16), "scales must be bfloat16"),
        (4, 3, "4 or 8 bits, got 3"),
        (7, 8, "act_bits=16, got 8"),
    ],
)
def test_wrong_arguments_are_named(emulation: Emulation, position: int, value, message: str) -> None:
    arguments = list(LinearCase(2, 16, 128).arguments())
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        emulation.ops.quantized_linear(*arguments)
