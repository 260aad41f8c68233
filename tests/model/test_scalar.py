"""One number for each position: against an independent forward, packing, dtypes, and weights from everywhere."""

from dataclasses import replace

import pytest
import torch

from internlm2.config import ConfigError
from internlm2.model import CausalLM
from internlm2.model.export import export_weights
from internlm2.model.scalar import ScalarModel, load_scalar_model
from internlm2.model.weights import model_weights, open_weights
from tests.model.checkpoint_folders import IDS, random_weights, write_checkpoint, write_official
from tests.oracles import transformer as oracle

BOUNDS = torch.tensor([0, 12], dtype=torch.int32)


def reward_weights(config):
    weights = random_weights(config)
    weights.pop("output.weight", None)
    weights["v_head.weight"] = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(0))
    return weights


def expected_values(config, weights, ids):
    """The oracle's hidden states, read by an output matrix that is the identity, times the head."""
    identity = {**weights, "output.weight": torch.eye(config.hidden_size)}
    hidden = oracle.logits(identity, replace(config, tie_embeddings=False), ids)
    return (hidden @ weights["v_head.weight"].double().t()).squeeze(-1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["folder", "checkpoint", "export"])
def test_values_equal_the_oracle(tmp_path, tiny, tied, kind):
    config = replace(tiny, tie_embeddings=tied)
    weights = reward_weights(config)
    if kind == "checkpoint":
        write_checkpoint(tmp_path, config, weights)
        source = tmp_path
    else:
        source = write_official(tmp_path / "a", config, weights)
    if kind == "export":
        source = export_weights(open_weights(source), tmp_path / "b").folder
    values = load_scalar_model(source, dtype=torch.float64)(IDS, BOUNDS)
    torch.testing.assert_close(values, expected_values(config, weights, IDS), rtol=0, atol=2e-5)
    assert values.std() > 1  # the comparison is about something


def test_score_is_the_value_at_the_last_token_of_each_sequence(tiny):
    model = ScalarModel.from_config(tiny, dtype=torch.float64, seed=1)
    lengths = (5, 1, 17)
    ids = torch.randint(131, (23,), generator=torch.Generator().manual_seed(2))
    cu = torch.tensor([0, 5, 6, 23], dtype=torch.int32)
    scores = model.scores(ids, cu)
    alone = [model(part, torch.tensor([0, len(part)], dtype=torch.int32))[-1] for part in ids.split(lengths)]
    torch.testing.assert_close(scores, torch.stack(alone), rtol=1e-10, atol=1e-12)


def test_values_of_a_bfloat16_model_are_float32_and_gradients_reach_every_parameter(tiny):
    model = ScalarModel.from_config(replace(tiny, initializer_range=0.2), dtype=torch.bfloat16, seed=1)
    values = model(IDS, BOUNDS)
    assert values.dtype == torch.float32
    assert values.shape == IDS.shape
    assert not torch.equal(values, values.bfloat16().float())  # not merely cast afterwards
    values.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_new_head_on_the_weights_of_a_language_model_or_a_reward_model(tmp_path, tiny):
    language = CausalLM.from_config(tiny, seed=3)
    export_weights(model_weights(language), tmp_path / "lm")
    first = load_scalar_model(tmp_path / "lm", head_seed=7)
    assert torch.equal(first.model.layers[1].attention.wqkv.weight, language.model.layers[1].attention.wqkv.weight)
    assert 0.01 < first.v_head.weight.std() < 0.03  # initializer_range 0.02
    export_weights(model_weights(first), tmp_path / "rm")
    critic = load_scalar_model(tmp_path / "rm", head_seed=8)
    assert torch.equal(critic.model.tok_embeddings.weight, first.model.tok_embeddings.weight)
    assert not torch.equal(critic.v_head.weight, first.v_head.weight)
    kept = load_scalar_model(tmp_path / "rm")
    assert torch.equal(kept.v_head.weight, first.v_head.weight)
    with pytest.raises(ConfigError, match=r"lm holds no v_head\.weight: it is a language model"):
        load_scalar_model(tmp_path / "lm")


def test_the_same_seed_gives_the_same_model_and_meta_allocates_nothing(tiny):
    first, second = (ScalarModel.from_config(tiny, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    empty = ScalarModel.from_config(tiny, device="meta")
    shapes = {name: tuple(value.shape) for name, value in empty.named_parameters()}
    assert shapes == {name: tuple(value.shape) for name, value in first.named_parameters()}
    assert shapes["v_head.weight"] == (1, 48)
    assert "output.weight" not in shapes
