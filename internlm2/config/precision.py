"""Which arithmetic `dtype: auto` means on a device."""

import functools
import platform
from pathlib import Path

DTYPES = ("auto", "bf16", "fp32")
# What multiplies bfloat16, as /proc/cpuinfo spells it: x86 (Cooper Lake, Zen 4 and later), Arm (Neoverse V1 and later).
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


def settled_dtype(dtype: str, device_type: str) -> str:
    """`dtype`, or for "auto" what the device multiplies fast: "bf16" on GPUs and on CPUs with instructions for it,
    else "fp32". Without them a product in bf16 takes 4 to 30 times as long as in fp32 (measured on AVX2, torch 2.13).
    """
    if dtype != "auto":
        return dtype
    return "bf16" if device_type != "cpu" or cpu_multiplies_bf16() else "fp32"


@functools.cache
def cpu_multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has bf16 products; False where the system does not say (everything but Linux)."""
    if platform.system() != "Linux" or not cpuinfo.is_file():
        return False
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not _BF16_FEATURES.isdisjoint(value.split())
    return False
