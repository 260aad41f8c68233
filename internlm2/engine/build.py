"""From the engine's config group to a device and an engine."""

import logging

import torch
from torch import nn

from internlm2.config.errors import ConfigError
from internlm2.config.schema import EngineConfig, OptimConfig
from internlm2.engine.base import Engine
from internlm2.engine.optimizer import decays
from internlm2.engine.single import SingleEngine

log = logging.getLogger(__name__)


def prepare_device(engine: EngineConfig) -> torch.device:
    """The device that `engine.device` means (auto: CUDA where there is one); sets the CPU threads if `engine.threads`
    is given.
    """
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    available = torch.cuda.is_available()
    if engine.device == "cuda" and not available:
        raise ConfigError("engine.device=cuda, but torch sees no CUDA device here: use engine.device=cpu or auto.")
    return torch.device("cuda" if available and engine.device != "cpu" else "cpu")


def build_engine(model: nn.Module, engine: EngineConfig, optim: OptimConfig, total_steps: int) -> Engine:
    """The engine that `engine.name` asks for, around `model`; says in one log line what it trains and how."""
    device = prepare_device(engine)
    built = SingleEngine(
        model,
        optim,
        total_steps,
        device,
        engine.dtype,
        engine.on_nonfinite,
        engine.spike_factor,
        engine.max_bad_steps,
    )
    decaying = decays(model, optim.decay_embeddings)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = sum(size for name, size in sizes.items() if decaying[name])
    precision = "fp32" if engine.dtype == "fp32" else "bf16 with fp32 masters and fp32 gradient sums"
    log.info(
        "engine single on %s, %s: %s trained parameters, weight decay %g on %s of them",
        device,
        precision,
        f"{sum(sizes.values()):,}",
        optim.weight_decay,
        f"{decayed:,}",
    )
    return built
