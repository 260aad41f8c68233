"""Small model shapes for this room's tests."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from internlm2.config import ModelConfig, RopeScalingConfig

SHAPES = Path(__file__).resolve().parents[2] / "conf" / "model"


def load_shape(name: str) -> ModelConfig:
    values = yaml.safe_load((SHAPES / f"{name}.yaml").read_text(encoding="utf-8"))
    values["rope_scaling"] = RopeScalingConfig(**values["rope_scaling"])
    return ModelConfig(**values)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on tensors of this size wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> ModelConfig:
    """Two layers, 3 queries for each of 2 kv heads, nothing a power of two where that might hide a bug."""
    return replace(
        load_shape("tiny"), vocab_size=131, hidden_size=48, layers=2, heads=6, kv_heads=2, head_dim=16,
        intermediate_size=80, max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture
def shape():
    """The shape of conf/model/NAME.yaml as a ModelConfig: `shape("7b")`."""
    return load_shape
