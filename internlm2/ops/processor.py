"""What this machine's CPU multiplies fast, as torch sees it. Never a timing: a resumed run takes the same path."""

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor


@functools.cache
def bfloat16_is_slow() -> bool:
    """True where torch's CPU products of bfloat16 go through a fallback: neither AVX-512 nor AMX (nor Arm's BF16).

    Measured on a Zen 3 core, [512, 1024] x [1024, 4096]: 9 Gflop/s in bfloat16, 67 in float32.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # private, so it may go
    return supported is not None and not supported()


def widens(*tensors: torch.Tensor) -> bool:
    """Whether a product of these is faster in float32 by more than the conversions cost. Same sums, one rounding.

    Tensors without contents stand for a run on other hardware (internlm2.dry_run): never.
    """
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return False
    return (
        all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors) and bfloat16_is_slow()
    )


def describe_products(device: torch.device | str, dtype: torch.dtype) -> str:
    """One line for the log at start: what linear layers multiply in."""
    kind = str(dtype).removeprefix("torch.")
    if torch.device(device).type == "cpu" and dtype == torch.bfloat16 and bfloat16_is_slow():
        return f"linear layers: {kind}, multiplied in float32 since this processor has no instructions for {kind}"
    return f"linear layers: {kind}"
