"""A model learns the same through the kernels as through the reference: loss curves within bfloat16 noise."""

from dataclasses import replace

import pytest
import torch

from internlm2.config import ModelConfig
from internlm2.config.compose import load_group
from internlm2.model.transformer import CausalLM
from internlm2.ops import extension


def losses(backend: str, dtype: torch.dtype) -> list[float]:
    """Ten steps on one packed row of four documents that repeat, so that there is something to attend to."""
    config = replace(load_group(ModelConfig, "model/tiny"), vocab_size=300, layers=2)
    model = CausalLM.from_config(config, dtype=dtype, attention=backend, seed=0)
    draw = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, config.vocab_size, (n,), generator=draw).repeat(4) for n in (7, 30, 1, 16)]
    ids = torch.cat(documents)
    labels = torch.cat([torch.cat([x[1:], torch.tensor([-100])]) for x in documents])
    bounds = torch.tensor([0, *torch.tensor([len(x) for x in documents]).cumsum(0).tolist()], dtype=torch.int32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    curve = []
    for _ in range(10):
        total, count = model.loss(ids, labels, bounds)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.skipif(not extension.load_cpu(), reason="needs the CPU kernels")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_loss_curves(dtype, limit):
    native, reference = losses("native", dtype), losses("reference", dtype)
    assert native[-1] < native[0] - 1.0
    assert max(abs(a - b) for a, b in zip(native, reference)) < limit
    assert native == losses("native", dtype)  # bit for bit
