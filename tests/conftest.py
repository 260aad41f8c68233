"""Fixtures that every room's tests share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from internlm2.text.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm2.text.tokenizer_training import train_model

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real InternLM2 tokenizer and GSM8K beside the checkout; skips where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data beside the checkout")
    return folder


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A test that joins a process group in pytest's own process would break every later test that forks ranks."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left a process group behind")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    """Bytes, a few letters and the markers: 300 ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_model(["the quick brown fox jumps over the lazy dog and writes code for it\n" * 20], 300))
    return SentencePieceTokenizer(path)
