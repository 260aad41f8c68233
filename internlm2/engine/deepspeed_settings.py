"""From the engine's config group to DeepSpeed's own configuration, and the one place that imports DeepSpeed."""

import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from internlm2.config.errors import ConfigError
from internlm2.config.schema import EngineConfig
from internlm2.run.ranks import Ranks

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def import_deepspeed(device: torch.device, ranks: Ranks) -> Any:
    """The package, ready for this process's device and process group."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for GPUs, and warns
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # it insists on the variable, also on one rank
    # torch renames two collectives; DeepSpeed's calls of the old names would print a warning each time.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("engine=zero1, zero2 and zero3 need DeepSpeed: pip install 'internlm2[deepspeed]'") from error
    if device.type == "cpu":
        # Otherwise the first engine compiles a C++ collective for half a minute, which only inference uses. The module
        # cannot be imported by its name, which torch shadows there.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def settings(engine: EngineConfig, parameters: int, device: torch.device, clip_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration. `parameters`: trained ones, beyond which no buffer needs to reach.

    Batch sizes are nominal, since our engine scales losses and sets the accumulation boundaries by itself. Only with
    more than one accumulation step does offloading keep its accumulators.
    """
    zero = engine.zero
    stage = STAGES[engine.name]
    largest = max(2, parameters + parameters % 2)
    optimization: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": zero.overlap and device.type == "cuda",
        "contiguous_gradients": True,
        "reduce_bucket_size": min(zero.reduce_bucket, largest),
        "allgather_bucket_size": min(zero.gather_bucket, largest),
        # The replacement for F.linear is global: it would slow every other model of the process.
        "memory_efficient_linear": False,
    }
    if zero.offload != "none":
        optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if stage == 3:
        optimization |= _sharded_weights(engine, largest)
        if zero.offload == "parameters":
            optimization["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
        if zero.shard_group is not None and zero.shard_group < dist.get_world_size():
            optimization["zero_hpz_partition_size"] = zero.shard_group
    written: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1 if zero.offload == "none" else 2,
        "gradient_clipping": clip_grad_norm,
        "steps_per_print": 1 << 60,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW updates offloaded state; DeepSpeed's needs a compiler
        "zero_optimization": optimization,
    }
    if engine.dtype == "bf16":
        # A bf16 gradient goes into the fp32 sum as soon as it is there. Otherwise the bf16 optimizer of ZeRO 1 adds the
        # gradients of earlier micro-batches once more with each later one.
        written["bf16"] = {"enabled": True, "immediate_grad_update": True}
        written["data_types"] = {"grad_accum_dtype": "fp32"}
        written["communication_data_type"] = zero.reduce_dtype
    return written


def frozen_settings(engine: EngineConfig, parameters: int) -> dict[str, Any]:
    """Configuration of a model that is only read, with its weights sharded over all ranks."""
    written: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1 << 60,
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,
            **_sharded_weights(engine, max(2, parameters)),
        },
    }
    if engine.dtype == "bf16":
        written["bf16"] = {"enabled": True}
    return written


def _sharded_weights(engine: EngineConfig, largest: int) -> dict[str, Any]:
    zero = engine.zero
    return {
        "stage3_max_live_parameters": zero.live_parameters,
        "stage3_max_reuse_distance": zero.live_parameters,
        "stage3_prefetch_bucket_size": min(zero.gather_bucket // 10, largest),
        "stage3_param_persistence_threshold": zero.persistent_parameters,
    }
