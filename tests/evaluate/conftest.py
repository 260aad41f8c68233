"""A small model with a trained tokenizer, in memory and as an export on disk."""

from pathlib import Path

import pytest
import torch

from internlm2.config import ModelConfig, RopeScalingConfig
from internlm2.config.evaluate import GenerationConfig
from internlm2.evaluate.subject import Subject
from internlm2.model.export import export_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import model_weights
from internlm2.sources.needles import ENGLISH, documents
from internlm2.text.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm2.text.tokenizer_training import train_model

VOCABULARY = 600


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [document.plain_text for document, _ in zip(documents("english"), range(60))]
    path.write_bytes(
        train_model([*texts, " ".join(ENGLISH.secrets), "大模型 书生 Question Answer #### 0123456789"], VOCABULARY)
    )
    return SentencePieceTokenizer(path)


def small_config(**changes) -> ModelConfig:
    values = {
        "name": "small",
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "layers": 2,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "norm_eps": 1e-5,
        "rope_base": 10000.0,
        "rope_scaling": RopeScalingConfig(kind="none", factor=1.0),
        "max_position_embeddings": 256,
        "initializer_range": 0.3,  # wide: the next token depends on all that came before
        "tie_embeddings": False,
        "pretrain_batch_tokens": 1024,
    }
    return ModelConfig(**(values | changes))


@pytest.fixture(scope="session")
def model() -> CausalLM:
    """Random weights, of which greedy decoding writes words: bytes that are no UTF-8 are decoded differently by every
    library.
    """
    model = CausalLM.from_config(small_config(), seed=3).eval()
    with torch.no_grad():
        model.output_weight[:259] = 0.0
    return model


@pytest.fixture(scope="session")
def export(model, tokenizer, tmp_path_factory) -> Path:
    """The model in the Llama layout, as any other program reads it."""
    folder = tmp_path_factory.mktemp("export") / "llama"
    export_weights(model_weights(model), folder, layout="llama", tokenizer=tokenizer.path)
    return folder


@pytest.fixture
def subject(model, tokenizer) -> Subject:
    return Subject("small", model, tokenizer, GenerationConfig(max_rows=16, kv_tokens=8192, quantize="none"), 2048)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
