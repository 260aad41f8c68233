"""A frozen model spread over the ranks reads like a plain one, beside a model that is trained."""

import pytest
import torch
from rank_training import engine_config, start, train
from tiny_training import Model

from internlm2.engine.frozen import FrozenModel
from tests.ranks import run_ranks

IDS = torch.arange(14).view(2, 7)


def read(dtype: torch.dtype, name: str):
    """Logits of the whole model on one rank alone and of the sharded one on both, between steps of another model."""
    device = torch.device("cpu")
    trained = start("zero3", seed=1)
    train(trained, 1)
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    settings = engine_config("zero3", dtype=kind, persistent_parameters=0)
    frozen = FrozenModel(Model().to(dtype), settings, device, sharded=name == "sharded")
    at_rest = sum(parameter.numel() for parameter in frozen.module.parameters())
    together = frozen(IDS)
    train(trained, 1)
    with torch.no_grad(), frozen.whole() as module:
        alone = module(IDS) if trained.rank == 0 else torch.zeros(0)
        names = sorted(name for name, parameter in module.named_parameters() if parameter.numel())
    again = frozen(IDS)
    after = sum(parameter.numel() for parameter in frozen.module.parameters())
    return {"together": together, "alone": alone, "again": again, "sizes": [at_rest, after], "names": names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded(dtype):
    with torch.no_grad():
        expected = Model().to(dtype)(IDS)
    ranks = run_ranks(read, 2, dtype, "sharded")
    assert torch.equal(ranks[0]["alone"], expected)
    for found in ranks:
        assert torch.equal(found["together"], expected)
        assert torch.equal(found["again"], expected)
        assert found["sizes"] == [0, 0]  # nothing that is whole lies around
        assert found["names"] == sorted(name for name, _ in Model().named_parameters())


def test_plain():
    with torch.no_grad():
        expected = Model()(IDS)
    (first, second) = run_ranks(read, 2, torch.float32, "plain")
    assert torch.equal(first["alone"], expected)
    assert torch.equal(second["again"], expected)
