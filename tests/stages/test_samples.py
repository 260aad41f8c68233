"""Samples for a person to read, of a model with more rows than its tokenizer has ids."""

from types import SimpleNamespace

import pytest
import torch

from internlm2.config import GenerationConfig
from internlm2.sources.toy_tokenizer import write_tokenizer
from internlm2.stages.samples import write_answers, write_completions
from internlm2.text.tokenizer import load_tokenizer
from tests.generation.conftest import tiny_model


@pytest.mark.parametrize("kind", ["completions", "answers"])
def test_every_id_that_is_drawn_has_a_text(kind, tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    model = tiny_model(vocab_size=tokenizer.vocab_size + 50)
    with torch.no_grad():  # what would be drawn first
        model.output_weight[-50:] = 2 * model.output_weight[:50]
    run = SimpleNamespace(writes=True, samples=tmp_path / "samples")
    settings = SimpleNamespace(samples=["red", "blue"], sample_tokens=8)
    generation = GenerationConfig(quantize="none", max_rows=4, kv_tokens=1024)
    if kind == "completions":
        write_completions(model, tokenizer, settings, generation, 3, run, 5)
    else:
        write_answers(model, tokenizer, settings, generation, run, 5)
    texts = (run.samples / "step_00000005.txt").read_text().split("\n\n----\n\n")
    assert len(texts) == 2
    assert all(question in text for question, text in zip(settings.samples, texts))
