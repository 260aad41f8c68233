"""Models that must not change: the reference policy and the reward model."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from internlm2.model.adapters import adapters_off
from internlm2.model.transformer import CausalLM


class ReferencePolicy:
    """The policy that KL is measured from: a model of its own, or the actor with its adapters off.

    With LoRA the frozen weights under the adapters are the reference, and cost no memory at all.
    """

    def __init__(self, model: CausalLM, *, shared: bool) -> None:
        self.shared, self._model = shared, model

    @contextlib.contextmanager
    def model(self, actor: CausalLM) -> Iterator[CausalLM]:
        """The reference as a plain module, without gradients; `actor` is the trained model as it is now."""
        with torch.no_grad():
            if self.shared:
                with adapters_off(actor):
                    yield actor
            else:
                yield self._model


def freeze(model: nn.Module) -> nn.Module:
    """No gradient, no dropout, for good."""
    return model.requires_grad_(False).eval()


def weights_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frozen_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Everything of `model` that is not trained; buffers that follow from the config are left out."""
    parameters = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    return parameters + [
        (name, b) for name, b in model.named_buffers() if not b.is_floating_point() or ".scales" in name
    ]
