"""Initial weights: right spread, and a function of seed and name alone."""

import math
from dataclasses import replace

import pytest
import torch

from internlm2.model import CausalLM, InternLM2, initial_values, initialize
from internlm2.model.initialization import BLOCK, initial_std


def test_spread_follows_the_depth_of_each_layer(shape):
    config = replace(shape("tiny"), layers=4)
    model = CausalLM.from_config(config, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        expected = 0.02
        if name.endswith(("wo.weight", "w2.weight")):
            expected = 0.02 / math.sqrt(2 * (int(name.split(".")[2]) + 1))
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_the_backbone_alone_gets_the_same_weights(tiny):
    whole = CausalLM.from_config(tiny, seed=7)
    backbone = InternLM2(tiny)
    initialize(backbone, tiny, 7, prefix="model.")
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, whole.get_parameter("model." + name))


def test_any_slice_is_a_slice_of_the_whole(tiny):
    numel = 2 * BLOCK + 1000
    whole = initial_values("output.weight", numel, tiny, seed=5)
    for start, stop in [(0, 10), (BLOCK - 3, BLOCK + 3), (17, 2 * BLOCK + 5), (numel - 1, numel), (9, 9)]:
        assert torch.equal(initial_values("output.weight", numel, tiny, 5, start, stop), whole[start:stop])
    with pytest.raises(ValueError, match=r"output\.weight"):
        initial_values("output.weight", 10, tiny, 5, 3, 11)


def test_seed_and_name_matter_and_global_state_does_not(tiny):
    first = initial_values("model.tok_embeddings.weight", 100, tiny, 1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(initial_values("model.tok_embeddings.weight", 100, tiny, 1), first)
    CausalLM.from_config(tiny, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(initial_values("model.tok_embeddings.weight", 100, tiny, 2), first)
    assert not torch.equal(initial_values("output.weight", 100, tiny, 1), first)


def test_a_depth_is_read_from_the_whole_number():
    assert initial_std("model.layers.11.attention.wo.weight", 0.02) == pytest.approx(0.02 / math.sqrt(24))
    assert initial_std("layers.0.feed_forward.w2.weight", 0.02) == pytest.approx(0.02 / math.sqrt(2))
    assert initial_std("model.layers.11.feed_forward.w1.weight", 0.02) == 0.02
