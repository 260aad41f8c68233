"""From the engine's config group to a device and an engine."""

import logging

import torch
from torch import nn

from internlm2.config.errors import ConfigError
from internlm2.config.schema import EngineConfig, OptimConfig
from internlm2.engine.base import Engine
from internlm2.engine.optimizer import decays
from internlm2.engine.single import SingleEngine
from internlm2.model.values import Values
from internlm2.run.ranks import from_environment

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
    if not available or engine.device == "cpu":
        return torch.device("cpu")
    if engine.name == "single":
        return torch.device("cuda")
    return torch.device("cuda", from_environment().local_rank)


def place_of_new_model(engine: EngineConfig, device: torch.device, *, adapted: bool = False) -> torch.device:
    """Where a model is made in fp32 before its engine takes it: nowhere ("meta": shapes alone) where ZeRO will ask for
    the pieces that each rank owns; on the host where adapters are put around its weights (`adapted`) before ZeRO cuts
    them up, since it need not fit on a GPU.
    """
    return device if engine.name == "single" else torch.device("cpu" if adapted else "meta")


def build_engine(
    model: nn.Module, engine: EngineConfig, optim: OptimConfig, total_steps: int, values: Values | None = None
) -> Engine:
    """The engine that `engine.name` asks for, around `model`; says in one log line what it trains and how.

    values  of a model without memory (on "meta"), which engines over many ranks take
    """
    device = prepare_device(engine)
    decaying = decays(model, optim.decay_embeddings)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = sum(size for name, size in sizes.items() if decaying[name])
    built: Engine
    if engine.name == "single":
        guard = (engine.on_nonfinite, engine.spike_factor, engine.max_bad_steps)
        built = SingleEngine(model, optim, total_steps, device, engine.dtype, *guard)
    else:
        from internlm2.engine.zero import ZeroEngine  # DeepSpeed is for those who ask for it

        built = ZeroEngine(model, engine, optim, total_steps, device, values)
    precision = "fp32" if engine.dtype == "fp32" else "bf16 with fp32 masters and fp32 gradient sums"
    log.info(
        "engine %s on %s, %s: %s trained parameters, weight decay %g on %s of them",
        describe_ranks(engine, built.world_size),
        device,
        precision,
        f"{sum(sizes.values()):,}",
        optim.weight_decay,
        f"{decayed:,}",
    )
    return built


def describe_ranks(engine: EngineConfig, world_size: int) -> str:
    """The engine and how its ranks are used, in a few words for the log."""
    if engine.name == "single":
        return engine.name
    parts = [f"{engine.name} over {world_size} rank{'s' if world_size > 1 else ''}"]
    if engine.sequence_parallel > 1:
        parts.append(f"{engine.sequence_parallel} to a row")
    if engine.zero.shard_group is not None:
        parts.append(f"sharded in groups of {engine.zero.shard_group}")
    if engine.zero.offload != "none":
        parts.append(f"{engine.zero.offload} offloaded")
    return ", ".join(parts)
