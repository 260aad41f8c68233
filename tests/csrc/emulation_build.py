"""Compiles csrc/cuda for the CPU emulation and loads it as torch operators.

One shared library holds the kernels, the emulation and the bindings under a namespace of its own, so that a mutant can
be loaded beside the real build. Object files are kept in build/emulation by the hash of all sources and flags.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

REPOSITORY = Path(__file__).resolve().parents[2]
CSRC = REPOSITORY / "csrc"
BUILD = REPOSITORY / "build" / "emulation"
FOLDERS = ("cuda", "emulation")
# No STB_GNU_UNIQUE and no interposition: two builds in one process must not share a variable or a function.
FLAGS = (
    *("-std=c++20", "-fPIC", "-g1", "-Wall", "-Wno-unknown-pragmas", "-DINTERNLM2_EMULATION"),
    *("-fvisibility=hidden", "-fno-gnu-unique"),
)
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-isystem{path}" for path in include_paths()))
JOBS = 2


@dataclass
class Counters:
    """Totals of warp instructions since the last reset; see csrc/emulation/runtime.h."""

    mma: int
    ldmatrix: int
    ldmatrix_wavefronts: int
    shared: int
    shared_wavefronts: int
    shared_ideal: int


class Emulation:
    """One loaded build: `ops` holds its operators."""

    def __init__(self, library: Path, namespace: str) -> None:
        torch.ops.load_library(str(library))
        self.ops = getattr(torch.ops, namespace)
        self._library = ctypes.CDLL(str(library))

    def configure(self, seed: int = 0, copies: str = "lazy", threads: int = 2, check_races: bool = True) -> None:
        mode = ("lazy", "eager", "mixed").index(copies)
        self._library.emulation_configure(ctypes.c_uint64(seed), mode, threads, int(check_races))

    def reset_counters(self) -> None:
        self._library.emulation_reset_counters()

    def counters(self) -> Counters:
        values = (ctypes.c_long * 6)()
        self._library.emulation_read_counters(values)
        return Counters(*values)


def sources(edits: dict[str, list[tuple[str, str]]] | None = None) -> dict[str, str]:
    """All sources by path relative to csrc, with `edits` (path -> [(old, new)]) applied. `old` must occur once."""
    texts = {
        str(path.relative_to(CSRC)): path.read_text()
        for folder in FOLDERS
        for path in sorted((CSRC / folder).iterdir())
        if path.suffix in (".cu", ".cuh", ".cpp", ".h")
    }
    for name, replacements in (edits or {}).items():
        for old, new in replacements:
            if texts[name].count(old) != 1:
                raise ValueError(f"{name} holds {texts[name].count(old)} times, not once: {old!r}")
            texts[name] = texts[name].replace(old, new)
    return texts


def build(
    namespace: str = "internlm2_emulation",
    edits: dict[str, list[tuple[str, str]]] | None = None,
    flags: tuple[str, ...] = ("-O2",),
    link_flags: tuple[str, ...] = (),
) -> Path:
    """The shared library of these sources, compiled unless it is there already. Skips the test where g++ is missing."""
    compiler = _compiler()
    texts = sources(edits)
    texts["namespace.cpp"] = f'extern "C" const char emulation_namespace[] = "{namespace}";\n'
    objects: list[Path] = []
    commands: list[tuple[list[str], Path]] = []
    tree = BUILD / "sources" / _digest(*texts.values())
    for name in texts:
        if name.endswith((".h", ".cuh")):
            continue
        command = [compiler, *FLAGS, *flags]
        if name == "cuda/bindings.cpp":
            command += TORCH_FLAGS
        target = BUILD / f"{Path(name).stem}-{_digest(_with_headers(name, texts), torch.__version__, *command)}.o"
        objects.append(target)
        if not target.exists():
            commands.append(([*command, "-x", "c++", "-c", str(tree / name)], target))
    library = BUILD / f"lib{namespace}-{_digest(*map(str, objects), *link_flags)}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{library.name}.lock").open("w") as lock:  # a second test process waits for the first one's build
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library, texts, tree, commands, objects, link_flags)
    return library


def _build(
    library: Path,
    texts: dict[str, str],
    tree: Path,
    commands: list[tuple[list[str], Path]],
    objects: list[Path],
    link_flags: tuple[str, ...],
) -> None:
    for name, text in texts.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda job: _compile(*job), commands))
    torch_libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-ltorch"]
    link = [_compiler(), "-shared", *map(str, objects), *link_flags, *torch_libraries, "-lpthread", "-Wl,-Bsymbolic"]
    _compile(link, library)


def build_plain(source: Path, flags: tuple[str, ...] = ()) -> Path:
    """A shared library of one test source and the emulation, without torch: called through ctypes."""
    compiler = _compiler()
    runtime = [CSRC / "emulation" / name for name in ("runtime.cpp", "shared_memory.cpp", "primitives.cpp")]
    texts = [source.read_text(), *sources().values()]
    library = BUILD / f"lib{source.stem}-{_digest(*texts, *flags)}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        inputs = ["-x", "c++", str(source), *map(str, runtime)]
        command = [compiler, *FLAGS, *flags, "-O1", "-shared", *inputs, "-lpthread"]
        _compile(command, library)
    return library


def load(namespace: str = "internlm2_emulation", edits: dict[str, list[tuple[str, str]]] | None = None) -> Emulation:
    return Emulation(build(namespace, edits), namespace)


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the CUDA kernels for the CPU emulation")
    return compiler


def _compile(command: list[str], target: Path) -> None:
    # Written beside and renamed: two test processes may build at once.
    partial = target.with_suffix(f".{os.getpid()}")
    result = subprocess.run(["nice", "-n", "15", *command, "-o", str(partial)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    partial.rename(target)


def _with_headers(name: str, texts: dict[str, str]) -> str:
    """A source and all it includes from csrc: what its object file depends on."""
    pending, seen = [name], []
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.append(current)
        included = re.findall(r'^#include "(.+)"', texts[current], flags=re.MULTILINE)
        pending += [os.path.normpath(Path(current).parent / path) for path in included]
    return "".join(texts[path] for path in sorted(seen))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
