"""The config group `generation`: what it builds and what it says."""

import pytest
import torch

from internlm2.config import GenerationConfig
from internlm2.generation import Engine, SamplingParams
from internlm2.generation.build import build_generator, describe_generation
from tests.generation.conftest import some_prompts, tiny_model

PARAMS = SamplingParams(temperature=0.0, max_new_tokens=6)


@pytest.mark.parametrize("quantize", ["none", "w8", "w4"])
def test_the_group_decides_what_samples(quantize):
    model = tiny_model(torch.bfloat16)
    built = build_generator(model, GenerationConfig(quantize=quantize, max_rows=3, kv_tokens=512), 290)
    assert (built.max_rows, built.kv_tokens, built.network.quantize, built.vocab_size) == (3, 512, quantize, 290)
    prompts = some_prompts(4)
    expected = Engine(model, quantize=quantize, vocab_size=290).generate(prompts, PARAMS)
    assert [answer.tokens for answer in built.generate(prompts, PARAMS)] == [answer.tokens for answer in expected]


def test_the_choice_is_printed():
    settings = GenerationConfig(quantize="w4", max_rows=64, kv_tokens=65536)
    line = describe_generation(settings, "cpu")
    assert line.startswith("generation: w4 weights, 8-bit activations (")
    assert line.endswith("; up to 64 rows, 65,536 tokens of cache")
    assert "weights as they are" in describe_generation(GenerationConfig("none", 1, 64), "cpu")
