"""What the pre-training stages hand to the engine and take from the data, without a training run."""

import json

import numpy as np
import pytest
import torch

from internlm2.config import ModelConfig
from internlm2.config.compose import load_group
from internlm2.data.rows import Row
from internlm2.engine.optimizer import decays
from internlm2.evaluate.position import LossByPosition, loss_by_position
from internlm2.model.transformer import CausalLM


@pytest.fixture(scope="module")
def model() -> CausalLM:
    config = load_group(ModelConfig, "model/tiny")
    config.vocab_size, config.layers = 128, 1
    return CausalLM.from_config(config, seed=3)


def test_matrices_decay_and_embeddings_and_norms_do_not(model):
    decaying = decays(model, decay_embeddings=False)
    assert {name for name, decays_ in decaying.items() if not decays_} == {
        "model.tok_embeddings.weight",
        "model.layers.0.attention_norm.weight",
        "model.layers.0.ffn_norm.weight",
        "model.norm.weight",
    }
    assert decays(model, decay_embeddings=True)["model.tok_embeddings.weight"]


def test_loss_by_position_is_the_mean_of_each_bin(model):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (32, 20):
        ids = torch.randint(0, 128, (length,), generator=generator).numpy()
        labels = [*ids[1:].tolist(), -100]
        bounds, none = np.array([0, length], np.int32), np.zeros(1, np.int32)
        rows.append(Row(ids, np.array(labels), bounds, none, none.astype(np.int64)))
    measured = loss_by_position(model, {"a": rows}, seq_len=32, bins=4)
    assert measured.tokens == [16, 16, 8 + 3, 7]
    losses = []
    for row in rows:
        ids, cu_seqlens = torch.from_numpy(row.ids), torch.from_numpy(row.cu_seqlens)
        logits = model(ids, cu_seqlens)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    first = torch.cat([part[:8] for part in losses]).mean()
    assert measured.loss[0] == pytest.approx(first.item(), rel=1e-5)
    beyond = torch.cat([part[16:] for part in losses]).mean()
    assert measured.mean(16) == pytest.approx(beyond.item(), rel=1e-5)


def test_an_empty_bin_has_no_loss():
    measured = LossByPosition(8, [1.0, float("nan"), 3.0], [2, 0, 4])
    assert measured.mean(8) == 3.0
    assert json.dumps(measured.tokens) == "[2, 0, 4]"
