"""From the config group `generation` to an engine."""

import torch

from internlm2.config import GenerationConfig
from internlm2.generation.engine import Engine
from internlm2.generation.projections import ACT_BITS
from internlm2.model.transformer import CausalLM
from internlm2.ops import describe_quantize


def build_generator(model: CausalLM, settings: GenerationConfig, vocab_size: int) -> Engine:
    """An engine on the model's current weights, in their dtype or quantized; `refresh()` takes later ones.

    It draws the `vocab_size` ids of a tokenizer.
    """
    return Engine(
        model,
        max_rows=settings.max_rows,
        kv_tokens=settings.kv_tokens,
        quantize=settings.quantize,
        vocab_size=vocab_size,
    )


def describe_generation(settings: GenerationConfig, device: torch.device | str) -> str:
    """One line for the log at start: what samples are drawn with."""
    weights = describe_quantize(settings.quantize, device, ACT_BITS)
    return f"generation: {weights}; up to {settings.max_rows} rows, {settings.kv_tokens:,} tokens of cache"
