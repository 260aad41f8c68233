"""Which parameters decay, and AdamW over them."""

from collections.abc import Iterable

import torch
from torch import nn

from internlm2.config.schema import OptimConfig


def decays(model: nn.Module, decay_embeddings: bool) -> dict[str, bool]:
    """For each trainable parameter of `model`, by name: is it drawn towards zero by weight decay?

    Matrices decay; one-dimensional parameters (RMSNorm weights) never do; embedding tables only by
    `decay_embeddings`. A tied output head counts as the embedding that it shares. The report gives one number (0.1)
    and no groups (report 3.2.2); the public InternEvo code decays every parameter, norms and embeddings included
    (InternEvo code, `create_param_groups`). Leaving out norms and embeddings is common practice: decay of a norm's
    gain fights its initial value of one, and a rare token's row would shrink in every step in which the token does
    not occur.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return {
        name: parameter.ndim >= 2 and (decay_embeddings or id(parameter) not in embeddings)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def build_adamw(
    parameters: Iterable[tuple[str, torch.Tensor]], decaying: dict[str, bool], optim: OptimConfig
) -> torch.optim.AdamW:
    """AdamW over fp32 tensors (`name`, leaf) in two groups; one kernel a group where torch has a fused one (CPU and
    CUDA).

    The moments are made here, not in the first step: a checkpoint can then be loaded into them, and memory is claimed
    early.
    """
    groups: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for name, tensor in parameters:
        groups[decaying[name]].append(tensor)
    everything = groups[True] + groups[False]
    fused = all(tensor.device.type in ("cpu", "cuda") for tensor in everything)
    optimizer = torch.optim.AdamW(
        [
            {"params": tensors, "weight_decay": optim.weight_decay if decaying else 0.0}
            for decaying, tensors in groups.items()
            if tensors
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=fused,
    )
    for tensor in everything:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }
    return optimizer
