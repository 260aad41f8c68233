"""Builds the kernels in csrc/ into internlm2/ops/: the CPU library always, the CUDA library where nvcc is found.

    pip install -e . --no-build-isolation      # builds in place; needs torch installed, g++ (or $CXX), a minute
    INTERNLM2_CUDA=0|1 pip install ...         # leave the CUDA library out, or fail where it cannot be built
    INTERNLM2_CUDA_ARCHITECTURES="80;90a"      # default: the GPU that is there, else A100 and H100

Both are plain shared objects on torch's stable ABI (no Python.h), loaded by torch.ops.load_library. A machine without a
compiler still gets a working package: plain PyTorch runs instead of the kernels, and says so once.
"""

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "kernels"

# Instruction sets of the CPU library: name -> compiler flags. csrc/cpu/dispatch.cpp chooses at run time.
X86_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
    "avx512_bf16": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni",
}
# 2.10 is the oldest torch whose stable ABI has what the bindings use.
HOST_FLAGS = shlex.split(
    "-O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -DTORCH_TARGET_VERSION=0x020a000000000000"
)


class BuildError(Exception):
    """A library cannot be built here; the text says why."""


def torch_paths() -> tuple[list[str], list[str]]:
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        raise BuildError("torch is not importable while building; run pip with --no-build-isolation") from None
    return [f"-isystem{path}" for path in include_paths()], [f"-L{path}" for path in library_paths()]


def compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    if found is None:
        raise BuildError("no C++ compiler (g++, c++, clang++ or $CXX) was found")
    return [found]


def run(command: list[str], log: Path | None = None) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"`{command[0]}` does not start: {error}") from None
    if log is not None:
        with log.open("a") as file:
            file.write(f"$ {shlex.join(command)}\n{done.stdout}")
    if done.returncode:
        raise BuildError(f"`{shlex.join(command)}` failed:\n{done.stdout[-4000:]}")


def compile_object(command: list[str], source: Path, name: str, log: Path | None = None) -> Path:
    """Compiles unless the object is newer than its folder, csrc/common/ and this file, and made by the same command."""
    target, stamp = OBJECTS / f"{name}.o", OBJECTS / f"{name}.command"
    command = [*command, "-c", str(source), "-o", str(target)]
    inputs = [*source.parent.rglob("*"), *(ROOT / "csrc" / "common").rglob("*"), ROOT / "setup.py"]
    newest = max(path.stat().st_mtime for path in inputs)
    fresh = target.is_file() and target.stat().st_mtime > newest
    if not (fresh and stamp.is_file() and stamp.read_text() == shlex.join(command)):
        run(command, log)
        stamp.write_text(shlex.join(command))
    return target


def build_cpu(target: Path) -> None:
    include, libraries = torch_paths()
    base = [*compiler(), *HOST_FLAGS]
    sets = {"portable": ""}
    if platform.machine() in ("x86_64", "AMD64"):
        sets |= X86_FLAGS
    source = ROOT / "csrc" / "cpu"

    def compile_set(name: str) -> Path | None:
        flags = [*shlex.split(sets[name]), f"-DINTERNLM2_ISA={name}"]
        try:
            return compile_object([*base, *flags], source / "kernels.cpp", f"cpu_{name}")
        except BuildError as error:
            if name == "portable":
                raise
            print(f"internlm2: kernels for {name} are left out: {error}")  # an old compiler
            return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        hosts = ("bindings", "generation_bindings", "team")
        bindings = [
            pool.submit(compile_object, [*base, *include], source / f"{name}.cpp", f"cpu_{name}") for name in hosts
        ]
        objects = dict(zip(sets, pool.map(compile_set, sets), strict=True))
        built = {name: path for name, path in objects.items() if path is not None}
        have = [f"-DINTERNLM2_HAVE_{name}" for name in built]
        dispatch = compile_object([*base, *have], source / "dispatch.cpp", "cpu_dispatch")
    # The portable object comes first: should two objects share an inline function, the linker keeps the first.
    objects_in_order = [*(job.result() for job in bindings), dispatch, *built.values()]
    link = [*compiler(), "-shared", "-o", str(target), *map(str, objects_in_order), *libraries, "-ltorch_cpu", "-lm"]
    run(link)


def cuda_architectures() -> list[str]:
    named = os.environ.get("INTERNLM2_CUDA_ARCHITECTURES")
    if named:
        return [part.strip() for part in named.replace(",", ";").split(";") if part.strip()]
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return [f"{major}{minor}" + ("a" if major >= 9 else "")]
    return ["80", "90a"]


def build_cuda(target: Path) -> None:
    include, libraries = torch_paths()
    source = ROOT / "csrc" / "cuda"
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("nvcc was not found on PATH or in $NVCC")
    toolkit = cuda_toolkit(nvcc)
    # -gencode pairs, not -arch: the shorthand also compiles for the architecture without its suffix, where wgmma fails.
    pairs = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in cuda_architectures()]
    flags = [nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", *pairs]
    log = ROOT / "build" / "ptxas.log"  # registers and spills of every kernel; a test holds them to a budget
    host = [*compiler(), *HOST_FLAGS, *include, f"-isystem{toolkit / 'include'}"]
    kernels = sorted(source.glob("*.cu"))
    for path in kernels:
        (OBJECTS / f"cuda_{path.stem}.o").unlink(missing_ok=True)  # always compiled, so that the log is complete
    log.unlink(missing_ok=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = [pool.submit(compile_object, flags, path, f"cuda_{path.stem}", log) for path in kernels]
        bindings = pool.submit(compile_object, host, source / "bindings.cpp", "cuda_bindings")
        objects = [str(job.result()) for job in [*jobs, bindings]]
    # libtorch.so pulls in libtorch_cuda where torch has it: the current stream's symbol resolves there and stays null
    # in a CPU torch, where the library still links and is never loaded.
    link = [*compiler(), "-shared", "-o", str(target), *objects, *libraries, "-Wl,--no-as-needed", "-ltorch"]
    link += ["-Wl,--as-needed", "-ltorch_cpu", *cuda_runtime(toolkit), "-ldl", "-lrt", "-lpthread"]
    run(link)


def cuda_toolkit(nvcc: str) -> Path:
    """Folder with include/cuda_runtime_api.h of this nvcc: asked of nvcc itself, since it may be a link."""
    named = os.environ.get("CUDA_HOME")
    try:
        dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    except OSError as error:
        raise BuildError(f"`{nvcc}` does not start: {error}") from None
    tops = [line.split("TOP=", 1)[1].strip() for line in dry.splitlines() if "TOP=" in line]
    for top in [*([named] if named else []), *tops, str(Path(os.path.realpath(nvcc)).parent.parent)]:
        if (Path(top) / "include" / "cuda_runtime_api.h").is_file():
            return Path(top).resolve()
    raise BuildError(f"no cuda_runtime_api.h belongs to {nvcc}; set CUDA_HOME")


def cuda_runtime(toolkit: Path) -> list[str]:
    """The static runtime: the library then needs a driver, but no CUDA toolkit, where it runs."""
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
        if (toolkit / folder / "libcudart_static.a").is_file():
            return [f"-L{toolkit / folder}", "-lcudart_static"]
    raise BuildError(f"libcudart_static.a is missing under {toolkit}")


class BuildKernels(build_ext):
    """Puts the libraries beside internlm2/ops/extension.py. What cannot be built is named and left out."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        OBJECTS.mkdir(parents=True, exist_ok=True)
        wanted = os.environ.get("INTERNLM2_CUDA", "")
        built = []
        for extension in self.extensions:
            cuda = extension.name.endswith("_cuda")
            if cuda and (wanted == "0" or not (ROOT / "csrc" / "cuda" / "bindings.cpp").is_file()):
                continue
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(".so.new")
            try:
                (build_cuda if cuda else build_cpu)(fresh)
            except BuildError as error:
                fresh.unlink(missing_ok=True)
                if cuda and wanted == "1":
                    raise SystemExit(
                        f"internlm2: INTERNLM2_CUDA=1, but the CUDA kernels cannot be built: {error}"
                    ) from None
                print(f"internlm2: {extension.name} was not built, plain PyTorch will run instead: {error}")
                continue
            fresh.replace(target)  # a process that has the old one loaded keeps it
            built.append(extension)
        self.extensions = built


setup(
    ext_modules=[
        Extension("internlm2.ops.libinternlm2_cpu", sources=["csrc/cpu/bindings.cpp"]),
        Extension("internlm2.ops.libinternlm2_cuda", sources=["csrc/cuda/bindings.cpp"]),
    ],
    cmdclass={"build_ext": BuildKernels},
)
