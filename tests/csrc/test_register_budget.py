"""nvcc compiles each kernel for A100 and H100 without spills, within the registers that register_budget.json allows.

After a deliberate change: python tests/csrc/test_register_budget.py writes the file anew from what nvcc reports.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_name("register_budget.json")
ARCHITECTURES = ("80", "90a")
SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
# The flags of setup.py, one architecture at a time. -gencode, since -arch=sm_90a would also compile for plain 90.
FLAGS = ("-O3", "-std=c++17", "-Xptxas=-v", "-cubin")


def compiler() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc")


def release() -> str:
    """Of nvcc, "13.0" for example: another release allocates registers differently."""
    text = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise RuntimeError(f"nvcc --version names no release:\n{text}")
    return found[1]


def compile_report(source: Path, architecture: str, folder: Path) -> dict[str, dict[str, int]]:
    """Kernel -> registers, spilled bytes and stack bytes, as ptxas states them."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    output = folder / f"{source.stem}.{architecture}.cubin"
    command = ["nice", "-n", "15", str(compiler()), *FLAGS, target, str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    text = subprocess.run(["c++filt"], input=result.stderr, capture_output=True, text=True, check=True).stdout
    report = {}
    for section in text.split("Compiling entry function")[1:]:
        name = re.search(r"'(?:void )?(.+?)\(\w+Params\)' for", section.replace("(anonymous namespace)::", ""))
        registers = re.search(r"Used (\d+) registers", section)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section)
        if not (name and registers and memory):
            raise RuntimeError(f"ptxas wrote something else than expected:\n{section}")
        stack, stores, loads = map(int, memory.groups())
        report[name[1]] = {"registers": int(registers[1]), "spilled": stores + loads, "stack": stack}
    return report


def reports(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> figures, over all sources."""
    jobs = [(source, architecture, folder) for architecture in ARCHITECTURES for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: compile_report(*job), jobs))
    merged: dict[str, dict[str, dict[str, int]]] = {f"sm_{name}": {} for name in ARCHITECTURES}
    for (_, architecture, _), report in zip(jobs, results):
        merged[f"sm_{architecture}"].update(report)
    return merged


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="needs nvcc on PATH or in $NVCC")
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_kernels_compile_for_both_architectures_within_their_registers(tmp_path: Path) -> None:
    budget = json.loads(BUDGET.read_text())
    measured = reports(tmp_path)
    same_release = release() == budget.pop("nvcc")
    assert measured.keys() == budget.keys()
    for architecture, kernels in measured.items():
        assert kernels.keys() == budget[architecture].keys(), (
            f"{architecture}: write the budget anew, see the docstring"
        )
        for kernel, figures in kernels.items():
            assert figures["spilled"] == 0, (architecture, kernel, figures)
            assert figures["stack"] == 0, (architecture, kernel, figures)
            if same_release:
                assert figures["registers"] <= budget[architecture][kernel], (architecture, kernel, figures)


def test_the_budget_leaves_each_kernel_a_whole_block_a_multiprocessor() -> None:
    """65536 registers a multiprocessor; blocks here have at most 256 threads."""
    budget = json.loads(BUDGET.read_text())
    assert budget.pop("nvcc")
    assert set(budget) == {"sm_80", "sm_90a"}
    for kernels in budget.values():
        assert len(kernels) > 10
        assert all(0 < registers <= 255 for registers in kernels.values())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        figures = reports(Path(name))
    spilling = [(a, k) for a, kernels in figures.items() for k, f in kernels.items() if f["spilled"] or f["stack"]]
    if spilling:
        sys.exit(f"these kernels spill or use the stack: {spilling}")
    text = {"nvcc": release()} | {
        a: {k: f["registers"] for k, f in sorted(kernels.items())} for a, kernels in figures.items()
    }
    BUDGET.write_text(json.dumps(text, indent=1) + "\n")
    print(BUDGET.read_text())
