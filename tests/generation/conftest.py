"""A model that is small enough for exact checks and has every feature: grouped queries, an untied output."""

import random

import pytest
import torch

from internlm2.config import ModelConfig, RopeScalingConfig
from internlm2.model import CausalLM


def tiny_model(dtype=torch.float32, *, vocab_size=300, seed=1, **changes) -> CausalLM:
    values = {
        "name": "test",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "layers": 3,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "norm_eps": 1e-5,
        "rope_base": 10000.0,
        "rope_scaling": RopeScalingConfig(kind="none", factor=1.0),
        "max_position_embeddings": 512,
        "initializer_range": 0.25,  # wide: the next token depends on all that came before
        "tie_embeddings": False,
        "pretrain_batch_tokens": 1024,
    }
    return CausalLM.from_config(ModelConfig(**(values | changes)), dtype=dtype, seed=seed)


def some_prompts(count: int, *, longest=30, vocab_size=300, seed=0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return some_prompts(12)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small products: a second thread only waits, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
