"""Memory for a model whose weights come later, in the training dtype, where DeepSpeed wants to find it."""

from typing import Any

import torch
from torch import nn


def make_room(
    model: nn.Module, deepspeed: Any, settings: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Give `model`, which is on "meta", parameters of `dtype` on `device` without values: whole for ZeRO 1 and 2; for
    ZeRO 3 one after another, each cut up before the next, so that a rank keeps its shards alone. `settings` are
    DeepSpeed's.
    """
    if not all(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "A model with frozen parameters needs its weights before the engine: only masters are asked for."
        )
    model.to(dtype)
    if settings["zero_optimization"]["stage"] < 3:
        model.to_empty(device=device)
        return
    node = deepspeed.utils.groups._get_zero_param_intra_parallel_group()  # of another engine of this process, or None
    sharding = deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype, zero_param_parallel_group=node)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            room = torch.empty(parameter.shape, dtype=dtype, device=sharding.local_device)
            made = nn.Parameter(room)
            module.register_parameter(name, made)
            sharding._convert_to_deepspeed_param(made)
            made.partition()  # type: ignore[attr-defined]
