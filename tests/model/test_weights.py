"""Reading weights: every source against an independent forward, and one clear sentence for every kind of damage."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm2.config import ConfigError, RopeScalingConfig
from internlm2.model import CausalLM
from internlm2.model.config_json import read_config, write_config
from internlm2.model.layouts import fuse_wqkv, llama_shapes, official_shapes, split_wqkv
from internlm2.model.weights import load_model, load_weights, model_weights, open_weights, read_weights
from tests.model.checkpoint_folders import (
    IDS,
    llama_config,
    random_weights,
    to_llama,
    write_checkpoint,
    write_llama,
    write_official,
)
from tests.oracles import transformer as oracle

BOUNDS = torch.tensor([0, 12], dtype=torch.int32)


def assert_equals_oracle(path, weights, config):
    ours = load_model(path, dtype=torch.float64)(IDS, BOUNDS)
    torch.testing.assert_close(ours, oracle.logits(weights, config, IDS), rtol=0, atol=3e-6)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def config(tiny, request):
    return replace(tiny, tie_embeddings=request.param)


def test_official_folder(tmp_path, config):
    weights = random_weights(config)
    assert_equals_oracle(write_official(tmp_path / "a", config, weights), weights, config)


def test_llama_folder(tmp_path, config):
    weights = random_weights(config)
    folder = write_llama(tmp_path / "a", config, to_llama(config, weights))
    assert_equals_oracle(folder, weights, config)
    for name, tensor in read_weights(folder)[1]:
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("given", ["run", "checkpoint"])
def test_our_checkpoint(tmp_path, config, given):
    weights = random_weights(config)
    write_checkpoint(tmp_path, config, random_weights(replace(config, initializer_range=0.1)), step=3)
    folder = write_checkpoint(tmp_path, config, weights, step=12)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    found, tensors, tokenizer = read_weights(tmp_path if given == "run" else folder)
    assert found == config
    assert tokenizer.samefile(tmp_path / "tokenizer")
    tensors = dict(tensors)
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], weights[name]) for name in weights)


def test_sharded_and_pytorch_files(tmp_path, tiny):
    weights = random_weights(tiny)
    folder = write_official(tmp_path / "a", tiny, weights)
    (folder / "model.safetensors").unlink()
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_equals_oracle(folder, weights, tiny)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_weights(folder)
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert_equals_oracle(folder, weights, tiny)


def test_pytorch_files_that_would_run_code_are_refused(tmp_path, tiny):
    folder = write_official(tmp_path / "a", tiny, random_weights(tiny))
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": RopeScalingConfig("none", 1.0)}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="need to run code are refused"):
        open_weights(folder)


def test_wqkv_splits_and_fuses_bit_for_bit(shape):
    config = replace(shape("20b"), hidden_size=3)
    wqkv = torch.arange(8192 * 3).view(8192, 3)
    q, k, v = split_wqkv(wqkv, config)
    assert [len(part) for part in (q, k, v)] == [6144, 1024, 1024]
    assert torch.equal(q[:768], wqkv[:768])  # the six query heads of the first group
    assert torch.equal(k[:128], wqkv[768:896])
    assert torch.equal(v[:128], wqkv[896:1024])
    assert torch.equal(fuse_wqkv(q, k, v, config), wqkv)


@pytest.mark.parametrize("parallel", [1, 2, 4, 8])
def test_wqkv_reshards_without_a_shuffle(shape, parallel):
    """The reason for the grouped layout (report 2.2): a rank's rows are a slice, and the slice is a smaller wqkv."""
    config = replace(shape("7b"), hidden_size=2)
    whole = split_wqkv(torch.arange(6144 * 2).view(6144, 2), config)
    part = replace(config, heads=32 // parallel, kv_heads=8 // parallel)
    ranks = [split_wqkv(rows, part) for rows in torch.arange(6144 * 2).view(6144, 2).chunk(parallel)]
    for index, tensor in enumerate(whole):
        assert torch.equal(torch.cat([rank[index] for rank in ranks]), tensor)


@pytest.mark.parametrize("name", ["1_8b", "7b", "20b", "smollm2_135m"])
def test_layouts_count_the_same_parameters(shape, name):
    config = shape(name)
    official = official_shapes(config)
    assert sum(torch.Size(size).numel() for size in official.values()) == config.parameters()["total"]
    llama = {part: size for tensor in official for part, size in llama_shapes(config, tensor).items()}
    assert sum(torch.Size(size).numel() for size in llama.values()) == config.parameters()["total"]


@pytest.mark.parametrize(
    ("changes", "base", "scaling"),
    [
        ({}, 1e6, ("none", 1.0)),
        ({"rope_theta": None}, 1e4, ("none", 1.0)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1e6, ("dynamic", 2.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 1e6, ("linear", 4.0)),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}, 5e4, ("none", 1.0)),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 5e4, "rope_type": "dynamic", "factor": 3.0}},
            5e4,
            ("dynamic", 3.0),
        ),
    ],
)
def test_rope_in_both_spellings(tmp_path, tiny, changes, base, scaling):
    (tmp_path / "config.json").write_text(json.dumps(llama_config(tiny, **changes)))
    config, layout = read_config(tmp_path)
    assert layout == "llama"
    assert config.rope_base == base
    assert config.rope_scaling == RopeScalingConfig(*scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"sliding_window": 4096, "model_type": "mistral"}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "has no vocab_size"),
    ],
)
def test_configs_that_compute_something_else_are_refused(tmp_path, tiny, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(llama_config(tiny, **changes)))
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def test_config_json_comes_back_as_it_was(tmp_path, tiny, shape):
    for config in (tiny, shape("20b"), replace(tiny, rope_scaling=RopeScalingConfig("linear", 2.0))):
        for layout in ("internlm2", "llama"):
            content = write_config(config, layout, torch.bfloat16, token_ids={"bos": 1, "eos": 2, "pad": 2})
            (tmp_path / "config.json").write_text(json.dumps(content))
            found, kind = read_config(tmp_path)
            assert kind == layout
            assert replace(found, name=config.name, pretrain_batch_tokens=config.pretrain_batch_tokens) == config


# One damaged folder each: (how to damage, what the message must name).
def _truncate(folder, weights):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _truncate_header(folder, weights):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _drop(folder, weights):
    save_file(
        {name: tensor for name, tensor in weights.items() if "1.attention.wo" not in name}, folder / "model.safetensors"
    )


def _add(folder, weights):
    save_file(weights | {"model.layers.0.attention.q_norm.weight": torch.ones(4)}, folder / "model.safetensors")


def _reshape(folder, weights):
    name = "model.layers.0.feed_forward.w2.weight"
    save_file(weights | {name: weights[name].t().contiguous()}, folder / "model.safetensors")


def _another_vocabulary(folder, weights):
    name = "model.tok_embeddings.weight"
    save_file(weights | {name: weights[name][:100].clone()}, folder / "model.safetensors")


def _no_safetensors(folder, weights):
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")


def _no_weights(folder, weights):
    (folder / "model.safetensors").unlink()


def _quantized(folder, weights):
    name = "model.norm.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"model\.safetensors is truncated: tensor \S+ ends at byte [\d,]+, the file has"),
        (_truncate_header, r"model\.safetensors is truncated inside its header"),
        (_drop, r"lacks tensor model\.layers\.1\.attention\.wo\.weight"),
        (_add, r"model\.safetensors holds model\.layers\.0\.attention\.q_norm\.weight, which is no part"),
        (_reshape, r"model\.layers\.0\.feed_forward\.w2\.weight has shape \[80, 48\], config\.json means \[48, 80\]"),
        (_another_vocabulary, r"model\.tok_embeddings\.weight has 100 rows, but config\.json says vocab_size=131"),
        (_no_safetensors, r"model\.safetensors is not a safetensors file"),
        (_no_weights, "holds no weights"),
        (_quantized, r"tensor model\.norm\.weight is stored as I8"),
    ],
)
def test_damage_is_named(tmp_path, tiny, damage, message):
    weights = random_weights(tiny)
    folder = write_official(tmp_path / "a", tiny, weights)
    damage(folder, weights)
    with pytest.raises(ConfigError, match=message) as caught:
        dict(open_weights(folder))
    assert str(tmp_path) in str(caught.value)


def test_a_tied_folder_with_another_output_matrix_is_refused(tmp_path, tiny):
    tied = replace(tiny, tie_embeddings=True)
    weights = random_weights(tiny)
    with pytest.raises(ConfigError, match="ties the embeddings, but output"):
        open_weights(write_official(tmp_path / "a", tied, weights))
    weights["output.weight"] = weights["model.tok_embeddings.weight"].clone()
    assert "output.weight" not in open_weights(write_official(tmp_path / "a", tied, weights)).dtypes


def test_a_checkpoint_with_a_hole_is_refused(tmp_path, tiny):
    folder = write_checkpoint(tmp_path, tiny, random_weights(tiny))
    (folder / "rank00001.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"step_00000007 holds [\d,]+ of the [\d,]+ elements of"):
        dict(open_weights(folder))


def test_places_without_weights_say_so(tmp_path):
    for path, message in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path, "neither config.json with weights nor a finished checkpoint"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_weights(path)
    (tmp_path / "enhance" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"several stages: name one of them, for instance .*enhance"):
        open_weights(tmp_path)


def test_loading_into_another_shape_is_refused(tiny):
    model = CausalLM.from_config(tiny)
    weights = random_weights(tiny)
    with pytest.raises(ConfigError, match=r"file: model\.tok_embeddings\.weight has shape \[131, 48\].*131 tokens"):
        load_weights(CausalLM.from_config(replace(tiny, vocab_size=130)), weights.items(), "file")
    with pytest.raises(ConfigError, match=r"file holds output\.weight, which this model has no place for"):
        load_weights(CausalLM.from_config(replace(tiny, tie_embeddings=True)), weights.items(), "file")
    with pytest.raises(ConfigError, match=r"file lacks output\.weight \(1 missing"):
        load_weights(model, list(weights.items())[:-1], "file")


def test_headers_are_read_without_the_data(tmp_path, tiny):
    """A header that promises 10^12 bytes is refused from its numbers, not by trying to read them."""
    folder = write_official(tmp_path / "a", tiny, random_weights(tiny))
    header = json.dumps({"big": {"dtype": "F32", "shape": [250_000_000_000], "data_offsets": [0, 10**12]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigError, match="truncated: tensor big"):
        open_weights(folder)


def test_a_model_in_memory_is_a_source(tiny):
    model = CausalLM.from_config(tiny, dtype=torch.bfloat16, seed=4)
    weights = model_weights(model)
    assert weights.dtype == torch.bfloat16
    assert list(weights.dtypes) == list(official_shapes(tiny))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights)


def test_reward_model_folder(tmp_path, tiny):
    weights = random_weights(tiny)
    del weights["output.weight"]
    weights["v_head.weight"] = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    folder = write_official(tmp_path / "a", tiny, weights, architectures=["InternLM2ForRewardModel"])
    found = dict(open_weights(folder))
    assert torch.equal(found["v_head.weight"], weights["v_head.weight"])
    with pytest.raises(ConfigError, match=r"holds v_head\.weight"):
        load_model(folder)
    assert load_file(folder / "model.safetensors").keys() == found.keys()
