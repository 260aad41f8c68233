"""Quantised copies of models: which layers change, what stays shared, and that a refresh follows the original."""

import pytest
import torch
from torch import nn

from internlm2.ops import Linear, QuantizedLinear, quantize_linears_, quantized_copy, refresh_


class Head(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embeddings = nn.Embedding(11, 128)
        self.layers = nn.ModuleList([Linear(128, 96, bias=False), nn.Linear(96, 128, bias=False)])
        self.norm = nn.LayerNorm(128)
        self.output = Head(128, 11, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(ids)
        return self.output(self.norm(x + self.layers[1](self.layers[0](x))))


IDS = torch.arange(11)


@pytest.mark.parametrize(("mode", "limit"), [("w8", 0.02), ("w4", 0.2)])
def test_frozen_model(mode, limit):
    model = Model().requires_grad_(False)
    exact = model(IDS)
    assert quantize_linears_(model, mode) is model
    assert all(isinstance(layer, QuantizedLinear) for layer in model.layers)
    assert type(model.output) is Head
    error = ((model(IDS) - exact).norm() / exact.norm()).item()
    assert 0 < error < limit


def test_none_changes_nothing():
    model = Model()
    assert quantize_linears_(model, "none") is model
    assert quantized_copy(model, "none") is model
    assert type(model.layers[0]) is Linear
    refresh_(model, model)


def test_a_head_with_few_outputs_stays_as_it_is():
    model = nn.ModuleDict({"body": Linear(64, 64, bias=False), "v_head": nn.Linear(64, 1, bias=False)})
    quantize_linears_(model.requires_grad_(False), "w4")
    assert isinstance(model["body"], QuantizedLinear)
    assert isinstance(model["v_head"], nn.Linear)


def test_trained_weights_are_refused():
    with pytest.raises(ValueError, match=r"layers\.0\.weight requires a gradient"):
        quantize_linears_(Model(), "w4")
    with pytest.raises(ValueError, match="use one of none, w8, w4"):
        quantized_copy(Model(), "w3")


def test_copy_shares_the_rest_and_follows_the_original():
    model = Model()
    rollout = quantized_copy(model, "w8", act_bits=8)
    assert type(model.layers[0]) is Linear
    assert rollout.embeddings.weight is model.embeddings.weight
    assert rollout.output.weight is model.output.weight
    before = rollout(IDS).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    refresh_(rollout, model)
    fresh = quantized_copy(model, "w8", act_bits=8)
    assert torch.equal(rollout(IDS), fresh(IDS))
    assert not torch.equal(rollout(IDS), before)
    with pytest.raises(ValueError, match="not the copy's original"):
        refresh_(rollout, nn.Sequential(nn.Linear(2, 2)))


def test_gradient_passes_through_a_frozen_model():
    model = quantize_linears_(Model().requires_grad_(False), "w4")
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model.layers[0](x).sum().backward()
    assert torch.allclose(x.grad[0], model.layers[0].weight.float().sum(0), atol=1e-2)


def test_survives_dtype_change_and_state_dict():
    model = quantize_linears_(Model().requires_grad_(False), "w4")
    expected = model.layers[0].weight
    other = quantize_linears_(Model().requires_grad_(False), "w4")
    other.layers[0].requantize_(torch.zeros(96, 128))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.float().layers[0].weight, expected)
    assert torch.equal(model.bfloat16().layers[0].weight, expected)
    assert model(IDS).dtype == torch.bfloat16
