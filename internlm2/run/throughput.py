"""Tokens per second, model FLOPs utilisation with its formula stated, and peak memory."""

import resource
import sys
from collections import deque
from collections.abc import Iterable
from statistics import median

from internlm2.config.schema import ModelConfig

# Dense bf16 peak of one device in TFLOP/s (NVIDIA data sheets; where those print the figure with sparsity, half of it).
# The first entry whose words all occur in the device's name counts. An unknown name has no entry: no MFU rather than
# a wrong one.
PEAK_TFLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H200", "NVL"), 835.0),  # H200 data sheet: 1,671 with sparsity
    (("H200",), 989.4),  # H200 SXM data sheet: 1,979 with sparsity
    (("H100", "NVL"), 835.0),  # H100 data sheet: 1,671 with sparsity
    (("H100", "PCIe"), 756.0),  # H100 PCIe data sheet: 1,513 with sparsity
    (("H100",), 989.4),  # H100 SXM data sheet: 1,979 with sparsity
    (("H800", "PCIe"), 756.0),  # as H100 PCIe; the H800 differs in its links
    (("H800",), 989.4),  # as H100 SXM
    (("A100",), 312.0),  # A100 data sheet, all form factors
    (("A800",), 312.0),  # as A100; the A800 differs in its links
)

FORMULA = (
    "MFU = (6 * P * tokens + 12 * layers * heads * head_dim * pairs) / (seconds * devices * peak): P = weights of all "
    "matrix products including the model's own output head, without the embedding; pairs = query-key pairs that causal "
    "attention inside each document really has; recomputation is not counted; peak is dense, in the training dtype"
)


def matmul_parameters(model: ModelConfig, outputs: int | None = None) -> int:
    """Weights that take part in matrix products: those of the layers and the output head, tied or not.

    outputs  numbers that the head gives for a token: None for the vocabulary, 1 for a reward model
    """
    attention = model.hidden_size * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    layer = attention + 3 * model.hidden_size * model.intermediate_size
    return model.layers * layer + (model.vocab_size if outputs is None else outputs) * model.hidden_size


def causal_pairs(lengths: Iterable[int]) -> int:
    """Query-key pairs of causal attention in sequences of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def step_flops(model: ModelConfig, tokens: int, pairs: int, outputs: int | None = None) -> float:
    """Model FLOPs of forward and backward over `tokens` tokens with `pairs` attended pairs; `outputs` as above.

    A weight costs 2 FLOPs a token forward and 4 backward. A pair costs 2 * head_dim in q k and 2 * head_dim in p v in
    each head and layer, and twice that backward.
    """
    attention = 12.0 * model.layers * model.heads * model.head_dim * pairs
    return 6.0 * matmul_parameters(model, outputs) * tokens + attention


def peak_flops(device_name: str, dtype: str, peak_tflops: float | None) -> float | None:
    """FLOP/s of one device: from the key run.peak_tflops if given, else from the table; None where neither knows.

    The table knows bf16 on whole GPUs: a slice of one (MIG), fp32 and CPUs have no entry.
    """
    if peak_tflops:
        return peak_tflops * 1e12
    words = device_name.replace("-", " ").split()
    if dtype != "bf16" or "MIG" in words:
        return None
    for required, tflops in PEAK_TFLOPS:
        if all(any(word.startswith(part) for word in words) for part in required):
            return tflops * 1e12
    return None


def peak_memory_bytes() -> int:
    """Most memory that this process has held: allocated on the GPU where there is one, else resident on the host."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Throughput:
    """Turns measured seconds into the record for timing.jsonl, and estimates the time left; `outputs` as above."""

    def __init__(self, model: ModelConfig, peak: float | None, *, devices: int = 1, outputs: int | None = None) -> None:
        self.model, self.peak, self.devices, self.outputs = model, peak, devices, outputs
        self._recent: deque[float] = deque(maxlen=20)

    def measure(self, seconds: float, tokens: int, pairs: int) -> dict[str, float | int | None]:
        """One step over all devices: seconds, tokens_per_second (all devices), mfu (0..1 or None), memory_bytes."""
        self._recent.append(seconds)
        mfu = None
        if self.peak:
            mfu = step_flops(self.model, tokens, pairs, self.outputs) / (seconds * self.devices * self.peak)
        return {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "mfu": mfu,
            "memory_bytes": peak_memory_bytes(),
        }

    def seconds_left(self, steps_left: int) -> float | None:
        """From the median of the last steps, which a checkpoint or a validation does not disturb; None before the
        first.
        """
        return median(self._recent) * steps_left if self._recent else None
