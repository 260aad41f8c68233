"""The kernels under AddressSanitizer: each global load and store of the emulation is checked against its tensor."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulation_build
import pytest

pytestmark = pytest.mark.slow

# Fibers switch stacks by hand, so stack variables are left unchecked.
COMPILE = ("-O1", "-fsanitize=address", "-fno-omit-frame-pointer", "--param=asan-stack=0")
LINK = ("-fsanitize=address",)
PLANTED = {"cuda/attention_forward.cu": [("if (t == 0 && row < length)", "if (t == 0 && row <= length)")]}
RUN = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import cuda_cases, emulation_build
emulation = emulation_build.Emulation(sys.argv[2], sys.argv[3])
emulation.configure(seed=5, copies="mixed")
ops = emulation.ops
for case in cuda_cases.ATTENTION_CASES.values():
    arguments = case.forward_arguments()
    out, lse = ops.rope_attention_forward(*arguments)
    ops.rope_attention_backward(case.grad_out, arguments[0], out, lse, *arguments[1:])
for case in cuda_cases.DECODE_CASES.values():
    ops.decode_attention(*case.arguments())
for case in cuda_cases.LINEAR_CASES.values():
    ops.quantized_linear(*case.arguments())
    ops.dequantize_weight(*case.weight_arguments, case.wide)
print("all cases ran")
"""


def run(namespace: str, edits: dict | None = None) -> subprocess.CompletedProcess:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the CUDA kernels for the CPU emulation")
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("needs the AddressSanitizer library of g++")
    library = emulation_build.build(namespace, edits, COMPILE, LINK)
    # Python itself is not instrumented: the sanitizer must be there before it, and its own leaks do not matter. Frames
    # are given by library and offset: whether names are found for them differs from run to run.
    environment = os.environ | {
        "LD_PRELOAD": found,
        "ASAN_OPTIONS": "detect_leaks=0:symbolize=0",
        "OMP_NUM_THREADS": "1",
    }
    path = json.dumps([str(Path(__file__).parent)])
    command = [sys.executable, "-c", RUN, path, str(library), namespace]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_no_kernel_leaves_its_tensors() -> None:
    result = run("internlm2_asan")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "all cases ran" in result.stdout


def test_a_store_one_row_past_the_end_is_reported() -> None:
    result = run("mutant_asan", PLANTED)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "WRITE of size 4" in result.stderr
    assert "libmutant_asan" in result.stderr  # the frame that stored
    assert "all cases ran" not in result.stdout
