"""Deliberate errors in the kernels: each must be caught. They test the tests, and above all the emulation.

A mutant is a textual edit of one source file. `caught_by` is a pattern of the emulation's message, or None where the
result itself must come out wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import emulation_build
import pytest
import torch
from cuda_cases import AttentionCase, DecodeCase, LinearCase, relative_error
from emulation_build import Emulation


def forward_error(emulation: Emulation) -> float:
    case = AttentionCase((150, 20), groups=1, queries=2, dim=64, seed=3)
    out, lse = emulation.ops.rope_attention_forward(*case.forward_arguments())
    expected, expected_lse, _ = case.reference()
    return max(relative_error(out, expected), relative_error(lse, expected_lse))


def backward_error(emulation: Emulation) -> float:
    case = AttentionCase((200,), groups=1, queries=2, dim=64, seed=3)
    arguments = case.forward_arguments()
    out, lse = emulation.ops.rope_attention_forward(*arguments)
    grad = emulation.ops.rope_attention_backward(case.grad_out, arguments[0], out, lse, *arguments[1:])
    return relative_error(grad, case.reference()[2])


def decode_error(emulation: Emulation) -> float:
    case = DecodeCase((600, 30), capacity=650, groups=1, queries=4, dim=64, seed=3)
    return relative_error(emulation.ops.decode_attention(*case.arguments()), case.reference())


def linear_error(emulation: Emulation) -> float:
    case = LinearCase(10, 40, 640, asymmetric=True, seed=3)
    return relative_error(emulation.ops.quantized_linear(*case.arguments()), case.reference())


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    error: Callable[[Emulation], float]
    caught_by: str | None = None


FORWARD, BACKWARD = "cuda/attention_forward.cu", "cuda/attention_backward.cu"
DECODE, LINEAR, TILES = "cuda/decode_attention.cu", "cuda/quantized_linear.cu", "cuda/tiles.cuh"
IN_FLIGHT, RACE = "still in flight", "race: |still in flight|nobody has written"

# Missing or misplaced synchronisation.
UNSYNCHRONISED = {
    "keys read before the barrier": Mutant(
        FORWARD, "__syncthreads();  // K(n) and the queries", "// K(n) and the queries", forward_error, RACE
    ),
    "keys overwritten before the barrier": Mutant(
        FORWARD, "__syncthreads();  // V(n) is there", "// V(n) is there", forward_error, RACE
    ),
    "values read before their wait": Mutant(
        FORWARD,
        "cu::cp_async_wait<0>();\n    __syncthreads();  // V(n)",
        "__syncthreads();  // V(n)",
        forward_error,
        IN_FLIGHT,
    ),
    "rows written out through shared memory without __syncwarp": Mutant(
        TILES,
        "  __syncwarp();\n#pragma unroll\n  for (int i = 0; i < 16 * D / 8 / 32",
        "#pragma unroll\n  for (int i = 0; i < 16 * D / 8 / 32",
        forward_error,
        RACE,
    ),
    "queries prefetched into the stage in use": Mutant(
        BACKWARD,
        "load_queries<S>(p, stages, stage ^ 1,",
        "load_queries<S>(p, stages, stage,",
        backward_error,
        "race: |in flight",
    ),
    "stage of keys overwritten before the barrier": Mutant(
        BACKWARD, "__syncthreads();  // these keys are there", "// these keys are there", backward_error, RACE
    ),
    "ring of a warp read without __syncwarp": Mutant(
        DECODE, "__syncwarp();  // the copies of all lanes", "// the copies of all lanes", decode_error, RACE
    ),
    "ring reused for the merge before the barrier": Mutant(
        DECODE, "__syncthreads();  // the ring is free", "// the ring is free", decode_error, RACE
    ),
    "one copy too few waited for": Mutant(
        LINEAR, "cu::cp_async_wait<S::Stages - 2>();", "cu::cp_async_wait<S::Stages - 1>();", linear_error, IN_FLIGHT
    ),
    "parts added up before the barrier": Mutant(
        LINEAR, "  __syncthreads();\n  if (work.part > 0) return;", "  if (work.part > 0) return;", linear_error, RACE
    ),
}

# Threads that wait for each other in vain.
STUCK = {
    "shuffle that half of the lanes skip": Mutant(
        FORWARD,
        "sum += __shfl_xor_sync(~0u, sum, 2);\n      inverse",
        "if (t < 2) sum += __shfl_xor_sync(~0u, sum, 2);\n      inverse",
        forward_error,
        "different instructions|deadlock|ended",
    ),
    "barrier that one warp skips": Mutant(
        FORWARD,
        "    __syncthreads();  // K(n) and the queries",
        "    if (warp_row > 0) __syncthreads();  // K(n) and the queries",
        forward_error,
        "different __syncthreads|race: |nobody has written",
    ),
    "copy that nobody waits for": Mutant(
        DECODE,
        "  cu::cp_async_wait<0>();\n  __syncthreads();  // the ring",
        "  __syncthreads();  // the ring",
        decode_error,
        "never waited for|still in flight",
    ),
}

# Wrong arithmetic.
WRONG = {
    "diagonal masked as well": Mutant(FORWARD, "> first_row + g + (e", ">= first_row + g + (e", forward_error),
    "sums of the old maximum kept": Mutant(FORWARD, "state.out[i][j][2 * h] *= correction;", "", forward_error),
    "row summed over half of its lanes": Mutant(
        FORWARD, "sum += __shfl_xor_sync(~0u, sum, 2);\n      inverse", "inverse", forward_error
    ),
    "logarithm of the wrong base": Mutant(
        FORWARD, "cu::log2_approximate(sum) * kLn2", "cu::log2_approximate(sum)", forward_error
    ),
    "delta with the wrong sign": Mutant(
        BACKWARD, "(grad_weights[j][e] - delta[h])", "(grad_weights[j][e] + delta[h])", backward_error
    ),
    "keys not rotated back": Mutant(
        BACKWARD, "(grad_keys, p.table, table_row)", "(grad_keys, p.table, 0 * table_row)", backward_error
    ),
    "second query head of the group left out": Mutant(
        BACKWARD,
        "heads_end = (group + 1) * p.queries_per_group;",
        "heads_end = group * p.queries_per_group + 1;",
        backward_error,
    ),
    "splits that overlap": Mutant(
        DECODE, "end = min(begin + share, length)", "end = min(begin + 2 * share, length)", decode_error
    ),
    "padding of the cache attended": Mutant(DECODE, ">= valid) scores", "> valid) scores", decode_error),
    "bytes of a word in another order": Mutant(LINEAR, "h ? 0x4342 : 0x4140", "h ? 0x4341 : 0x4240", linear_error),
    "scale of the neighbour": Mutant(LINEAR, "(e & 1 ? odd : even)", "(e & 1 ? even : odd)", linear_error),
    "halves of a B fragment exchanged": Mutant(
        TILES,
        "swizzled<D>(row + lane / 16 * 8 + lane % 8, lane / 8 % 2)",
        "swizzled<D>(row + lane / 8 % 2 * 8 + lane % 8, lane / 16)",
        forward_error,
    ),
}

FAST = {"keys read before the barrier", "ring of a warp read without __syncwarp", "bytes of a word in another order"}


def parameters(mutants: dict[str, Mutant]) -> list:
    return [
        pytest.param(name, mutant, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, mutant in mutants.items()
    ]


def load(name: str, mutant: Mutant) -> Emulation:
    namespace = "mutant_" + re.sub(r"\W+", "_", name)
    return emulation_build.load(namespace, {mutant.file: [(mutant.old, mutant.new)]})


@pytest.mark.parametrize(("name", "mutant"), parameters(UNSYNCHRONISED | STUCK))
def test_synchronisation_errors_are_reported_under_any_schedule(name: str, mutant: Mutant) -> None:
    emulation = load(name, mutant)
    assert mutant.caught_by is not None
    for copies in ("lazy", "eager"):
        for seed in (0, 1):
            emulation.configure(seed=seed, copies=copies)
            with pytest.raises(RuntimeError, match=mutant.caught_by):
                mutant.error(emulation)


@pytest.mark.parametrize(("name", "mutant"), parameters(WRONG))
def test_wrong_arithmetic_gives_wrong_results(name: str, mutant: Mutant) -> None:
    assert mutant.error(load(name, mutant)) > 2e-2


@pytest.mark.parametrize(
    ("name", "schedules"),
    [
        ("keys read before the barrier", [("lazy", seed) for seed in range(8)]),
        pytest.param(
            "keys overwritten before the barrier", [("eager", seed) for seed in range(8)], marks=pytest.mark.slow
        ),
        pytest.param(
            "stage of keys overwritten before the barrier", [("lazy", 0), ("lazy", 1)], marks=pytest.mark.slow
        ),
    ],
)
def test_schedules_alone_expose_a_missing_barrier(name: str, schedules: list) -> None:
    """Second line of defence: without the race check, drifting warps and late or early copies spoil the result."""
    mutant = UNSYNCHRONISED[name]
    emulation = load(name, mutant)
    errors = []
    for copies, seed in schedules:
        emulation.configure(seed=seed, copies=copies, check_races=False)
        errors.append(mutant.error(emulation))
    assert max(errors) > 2e-2, errors


@pytest.mark.slow
def test_only_the_conflict_count_sees_a_missing_swizzle() -> None:
    mutant = Mutant(TILES, "return row * D + ((chunk ^ (row & 7)) * 8);", "return row * D + chunk * 8;", forward_error)
    emulation = load("no swizzle", mutant)
    emulation.reset_counters()
    assert mutant.error(emulation) < 1e-2
    counters = emulation.counters()
    assert counters.ldmatrix_wavefronts == 32 * counters.ldmatrix


def test_the_unchanged_kernels_pass_what_catches_the_mutants(emulation: Emulation) -> None:
    for error in (forward_error, backward_error, decode_error, linear_error):
        assert error(emulation) < 1e-2
    assert torch.isfinite(torch.tensor(forward_error(emulation)))
