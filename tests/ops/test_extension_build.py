"""A machine without a working compiler gets a working package and one line that says what is missing."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def build(folder: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", folder],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_compiler_is_no_failure(tmp_path):
    run = build(str(tmp_path), CXX="/nonexistent/c++", INTERNLM2_CUDA="0")
    assert run.returncode == 0, run.stderr
    assert "libinternlm2_cpu was not built, plain PyTorch will run instead" in run.stdout
    assert "/nonexistent/c++" in run.stdout
    assert not list(tmp_path.rglob("*.so*"))


def test_cuda_that_was_asked_for_is_not_left_out_quietly(tmp_path):
    run = build(str(tmp_path), CXX="/nonexistent/c++", NVCC="/nonexistent/nvcc", INTERNLM2_CUDA="1")
    assert run.returncode != 0
    assert "INTERNLM2_CUDA=1, but the CUDA kernels cannot be built" in run.stderr
