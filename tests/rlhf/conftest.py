"""A small vocabulary and a small reward model with large weights, in one process of one thread."""

from collections.abc import Callable

import pytest
import torch

from internlm2.config import ModelConfig, RopeScalingConfig
from internlm2.model.scalar import ScalarModel
from internlm2.text.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm2.text.tokenizer_training import train_model


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on tensors of this size wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    """Bytes, a few letters and the markers: 300 ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_model(["the quick brown fox jumps over the lazy dog and is helpful\n" * 20], 300))
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="session")
def small_shape() -> ModelConfig:
    """Two layers over that vocabulary."""
    return ModelConfig(
        name="small", vocab_size=300, hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate_size=48,
        norm_eps=1e-5, rope_base=1e4, rope_scaling=RopeScalingConfig("none", 1.0), max_position_embeddings=512,
        initializer_range=0.2, tie_embeddings=False, pretrain_batch_tokens=1024,
    )  # fmt: skip


@pytest.fixture
def reward_model(small_shape) -> Callable[..., ScalarModel]:
    """`reward_model(dtype=..., seed=...)`."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 1) -> ScalarModel:
        return ScalarModel.from_config(small_shape, dtype=dtype, seed=seed)

    return make
