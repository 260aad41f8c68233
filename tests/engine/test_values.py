"""Weights that an engine asks for in pieces: the same training, and no rank ever holds the model in fp32."""

import weakref

import pytest
import torch
from rank_training import engine_config
from tiny_training import OPTIM
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internlm2.config import ConfigError, ModelConfig
from internlm2.config.compose import load_group
from internlm2.data.batch import PackedBatch
from internlm2.engine.base import LossSum
from internlm2.engine.build import build_engine
from internlm2.model.export import export_weights
from internlm2.model.scalar import ScalarModel, load_scalar_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.values import random_values, stored_values
from internlm2.model.weights import model_weights, open_weights
from tests.ranks import run_ranks

RANKS = 4


class WideBytes(TorchDispatchMode):
    """Counts the bytes of fp32 tensors that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 and leaf.device.type == "cpu":
                self.count(leaf.untyped_storage())
        return out

    def count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known and self.known[key].alive:
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        self.known[key] = weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        self.live -= size
        self.known.pop(key, None)


def small() -> ModelConfig:
    return load_group(ModelConfig, "model/micro")


def started(name: str, dtype: str, in_pieces: bool, **changes):
    """An engine around a new model, and the most fp32 bytes that building both took."""
    config, settings = small(), engine_config(name, dtype=dtype, **changes)
    with WideBytes() as counted:
        if in_pieces:
            model = CausalLM.from_config(config, device="meta", seed=None)
            engine = build_engine(model, settings, OPTIM, 10, random_values(model, config, seed=5))
        else:
            engine = build_engine(CausalLM.from_config(config, seed=5), settings, OPTIM, 10)
    return engine, counted.peak


def both(name: str, dtype: str, changes: dict) -> dict:
    """Train twice, from a model and from pieces; whether all is equal, and the bytes."""
    found, peaks = [], []
    for in_pieces in (False, True):
        engine, peak = started(name, dtype, in_pieces, **changes)
        first = {key: weight.clone() for key, weight in engine.full_weights()}
        with engine.whole() as model:
            whole = {key: p.detach().clone() for key, p in model.named_parameters()}
        ids = torch.arange(64).view(4, 16)[engine.data_rank]
        bounds, zeros = torch.tensor([0, 16], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        batch = PackedBatch(ids, ids.roll(-1), bounds, 16, zeros, zeros.long())
        losses = [engine.train_step([batch], loss).loss for _ in range(2)]
        found.append((first, whole, losses))
        peaks.append(peak)
    same = all(torch.equal(found[0][part][key], found[1][part][key]) for part in (0, 1) for key in found[0][part])
    return {"same": same, "losses": [losses for _, _, losses in found], "peaks": peaks}


def loss(model, batch) -> LossSum:
    return LossSum(model(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels), batch.loss_tokens)


@pytest.mark.parametrize(
    ("name", "dtype", "changes"),
    [
        ("zero1", "bf16", {}),
        ("zero3", "bf16", {}),
        pytest.param("zero2", "bf16", {}, marks=pytest.mark.slow),
        pytest.param("zero3", "fp32", {}, marks=pytest.mark.slow),
        pytest.param("zero1", "fp32", {}, marks=pytest.mark.slow),
        pytest.param("zero3", "bf16", {"shard_group": 2}, marks=pytest.mark.slow),
        pytest.param("zero1", "bf16", {"shard_group": 2}, marks=pytest.mark.slow),
        pytest.param("zero3", "bf16", {"offload": "parameters"}, marks=pytest.mark.slow),
    ],
)
def test_pieces_train_like_a_model_and_take_a_model_less(name, dtype, changes):
    whole = 4 * small().parameters()["total"]
    for found in run_ranks(both, RANKS, name, dtype, changes):
        assert found["same"]
        assert found["losses"][0] == found["losses"][1]
        saved = found["peaks"][0] - found["peaks"][1]
        if dtype == "bf16" or name == "zero3":
            assert saved > 0.7 * whole, (found["peaks"], whole)  # a piece is a parameter at most: here 15% of all


def test_stored_values_are_what_loading_gives(tmp_path):
    """An export's weights, and those of a language model as a critic's with a new head."""
    config = small()
    folder = export_weights(model_weights(CausalLM.from_config(config, seed=1)), tmp_path / "export").folder
    weights = open_weights(folder)
    model = CausalLM.from_config(config, device="meta", seed=None)
    values = stored_values(model, weights, "there")
    name = "model.layers.1.attention.wqkv.weight"
    assert torch.equal(values(name, 3, 70), weights.read(name).flatten()[3:70].float())
    critic = ScalarModel.from_config(config, seed=None)
    load_scalar_weights(critic, weights, "there", head_seed=9)
    shapes = ScalarModel.from_config(config, device="meta", seed=None)
    drawn = stored_values(shapes, weights, "there", 9)
    shapes.v_head.weight = torch.nn.Parameter(torch.empty(0))  # as ZeRO 3 leaves it
    for key, parameter in critic.named_parameters():
        assert torch.equal(drawn(key, 0, parameter.numel()), parameter.flatten())
    with pytest.raises(ConfigError, match="there lacks v_head"):
        stored_values(critic, weights, "there")
