"""A small SentencePiece file, trained in a moment."""

import io

import pytest


def train(path, **options):
    spm = pytest.importorskip("sentencepiece")
    buffer = io.BytesIO()
    text = [
        line for _ in range(3) for line in ("def add(a, b): return a + b", "the cat sat on the mat", "大模型 书生") * 5
    ]
    defaults = {
        "model_type": "bpe", "vocab_size": 310, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "hard_vocab_limit": False, "num_threads": 1,
        "user_defined_symbols": ["<|im_start|>", "<|im_end|>"], "minloglevel": 2,
    }  # fmt: skip
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=buffer, **defaults | options)
    path.write_bytes(buffer.getvalue())
    return path
