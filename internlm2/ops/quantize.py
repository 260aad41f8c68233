"""`quantize: none|w8|w4`: frozen models, and rollout copies of trained ones, with quantised linear layers.

Heads stay as they are: layers with a forward of their own, such as the LM head (rounding the output matrix moves every
logit), and those with fewer outputs than one tile of the layout, such as a reward head.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from internlm2.ops.extension import instruction_set, loaded
from internlm2.ops.linear import Linear
from internlm2.ops.quantized import TILE, QuantizedWeight, dequantize_weight, quantize_weight, quantized_linear

MODES = ("none", "w8", "w4")


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight [N, K] is frozen in 4 or 8 bits. Gradient flows to the input."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: QuantizedWeight, act_bits: int = 16):
        super().__init__()
        self.bits, self.act_bits = weight.bits, act_bits
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """`model.to(dtype)` moves the buffers but must not widen the scales, which are bfloat16 by layout."""
        super()._apply(fn, recurse)
        self.scales = self.scales.to(torch.bfloat16)
        return self

    @property
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.packed, self.scales, self.zeros, self.bits, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, [N, K] bfloat16, made anew at each access."""
        return dequantize_weight(self.quantized)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.quantized, self.act_bits)

    @torch.no_grad()
    def requantize_(self, weight: Tensor) -> None:
        """Takes new values [N, K], in place: what a rollout copy does after each update of the policy."""
        if weight.shape != (self.out_features, self.in_features):
            expected = [self.out_features, self.in_features]
            raise ValueError(f"this layer holds a weight {expected}, got {list(weight.shape)}.")
        new = quantize_weight(_quantizable(weight), self.bits, symmetric=self.zeros.numel() == 0)
        self.packed.copy_(new.packed)
        self.scales.copy_(new.scales)
        self.zeros.copy_(new.zeros)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, act_bits={self.act_bits}"


def quantize_linears_(model: nn.Module, mode: str, *, act_bits: int = 16, symmetric: bool = True) -> nn.Module:
    """Quantises the linear layers of a frozen model in place; "none" leaves it alone. Returns the model."""
    bits = _bits(mode)
    if bits is None:
        return model
    layers = list(_linears(model))
    trained = next((name for name, layer in layers if layer.weight.requires_grad), None)
    if trained is not None:
        raise ValueError(
            f"quantize={mode} is for frozen models, but {trained}.weight requires a gradient: "
            "call requires_grad_(False) first, or use quantized_copy."
        )
    for name, layer in layers:
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, _quantized(layer, bits, act_bits, symmetric))
    return model


def quantized_copy(model: nn.Module, mode: str, *, act_bits: int = 16, symmetric: bool = True) -> nn.Module:
    """A copy for rollouts: linear layers quantised, everything else (embeddings, norms, heads) shared with `model`.

    Shared parameters follow the original by themselves; call `refresh_` for the rest after each update. "none" gives
    `model` itself.
    """
    bits = _bits(mode)
    if bits is None:
        return model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for _, layer in _linears(model):
        shared[id(layer)] = _quantized(layer, bits, act_bits, symmetric)
    return copy.deepcopy(model, shared)


def refresh_(rollout: nn.Module, model: nn.Module) -> None:
    """Brings a `quantized_copy` up to date with the model that it was made from."""
    if rollout is model:
        return
    sources = dict(model.named_modules())
    for name, layer in rollout.named_modules():
        if isinstance(layer, QuantizedLinear):
            source = sources.get(name)
            if not isinstance(source, nn.Linear):
                raise ValueError(f"the model has no linear layer {name!r}: this is not the copy's original.")
            layer.requantize_(source.weight)


def describe_quantize(mode: str, device: torch.device | str, act_bits: int = 16) -> str:
    """For the log at start: the weights' and activations' bits, and what multiplies them."""
    device = torch.device(device)
    if _bits(mode) is None:
        return "weights as they are"
    compiled = instruction_set() if device.type == "cpu" else "compiled" if loaded(device.type) else "none"
    how = "plain PyTorch" if compiled == "none" else f"native, {device.type} {compiled}"
    activations = f"{act_bits}-bit" if device.type == "cpu" else "16-bit"
    return f"{mode} weights, {activations} activations ({how})"


def _bits(mode: str) -> int | None:
    if mode not in MODES:
        raise ValueError(f"quantize={mode!r} does not exist: use one of {', '.join(MODES)}.")
    return {"none": None, "w8": 8, "w4": 4}[mode]


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, layer in model.named_modules():
        plain = type(layer).forward in (nn.Linear.forward, Linear.forward)
        if isinstance(layer, nn.Linear) and plain and layer.bias is None and name and layer.out_features >= TILE:
            yield name, layer


def _quantizable(weight: Tensor) -> Tensor:
    return weight if weight.dtype in (torch.bfloat16, torch.float32) else weight.float()


def _quantized(layer: nn.Linear, bits: int, act_bits: int, symmetric: bool) -> QuantizedLinear:
    quantized = QuantizedLinear(quantize_weight(_quantizable(layer.weight), bits, symmetric), act_bits)
    return quantized.train(layer.training)
