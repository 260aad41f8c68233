"""Export folders: opened by transformers, re-read bit for bit, and never half written."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from internlm2.config import ConfigError, RopeScalingConfig
from internlm2.model import CausalLM
from internlm2.model import export as export_module
from internlm2.model.export import export, export_weights
from internlm2.model.layouts import official_shapes
from internlm2.model.weights import model_weights, open_weights
from tests.model.checkpoint_folders import IDS, random_weights, to_llama, write_checkpoint, write_llama, write_official
from tests.model.trained_tokenizer import train
from tests.oracles import transformer as oracle


@pytest.fixture
def source(tmp_path, tiny):
    return write_official(tmp_path / "source", tiny, random_weights(tiny, torch.bfloat16))


def folder_tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_a_re_save_is_bit_equal(tmp_path, source, tiny, shard_bytes):
    done = export_weights(open_weights(source), tmp_path / "again", shard_bytes=shard_bytes)
    assert_same_tensors(folder_tensors(tmp_path / "again"), load_file(source / "model.safetensors"))
    assert done.parameters == sum(torch.Size(shape).numel() for shape in official_shapes(tiny).values())
    shards = list((tmp_path / "again").glob("*.safetensors"))
    if shard_bytes == 30_000:
        assert len(shards) > 3
        index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 2 * done.parameters
        assert_same_tensors(dict(open_weights(tmp_path / "again")), load_file(source / "model.safetensors"))
    else:
        assert [shard.name for shard in shards] == ["model.safetensors"]


@pytest.mark.parametrize("tied", [False, True])
def test_through_the_llama_layout_and_back_bit_for_bit(tmp_path, tiny, tied):
    config = replace(tiny, tie_embeddings=tied)
    weights = random_weights(config, torch.bfloat16)
    export_weights(open_weights(write_official(tmp_path / "a", config, weights)), tmp_path / "b", layout="llama")
    assert_same_tensors(folder_tensors(tmp_path / "b"), to_llama(config, weights))
    export_weights(open_weights(tmp_path / "b"), tmp_path / "c")
    expected = weights | ({"output.weight": weights["model.tok_embeddings.weight"]} if tied else {})
    assert_same_tensors(folder_tensors(tmp_path / "c"), expected)
    assert_same_tensors(dict(open_weights(tmp_path / "c")), weights)


@pytest.mark.parametrize("shape_name", ["1_8b", "7b", "20b"])
def test_every_released_size_round_trips(tmp_path, shape, shape_name):
    """The released head counts, at one layer and a narrow width."""
    config = replace(shape(shape_name), layers=1, hidden_size=8, intermediate_size=16, vocab_size=32)
    weights = random_weights(config, torch.bfloat16)
    export_weights(open_weights(write_official(tmp_path / "a", config, weights)), tmp_path / "b", layout="llama")
    assert_same_tensors(dict(open_weights(tmp_path / "b")), weights)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["internlm2", "llama"])
def test_transformers_computes_the_same_logits(tmp_path, tiny, layout, tied):
    transformers = pytest.importorskip("transformers")
    config = replace(tiny, tie_embeddings=tied)
    weights = random_weights(config)
    run = write_checkpoint(tmp_path / "run", config, weights)
    export_weights(open_weights(run), tmp_path / "out", layout=layout, shard_bytes=50_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == {"internlm2": "InternLM2ForCausalLM", "llama": "LlamaForCausalLM"}[layout]
    with torch.no_grad():
        logits = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits.double(), oracle.logits(weights, config, IDS), rtol=0, atol=1e-4)


def test_dtype_is_cast_and_stated(tmp_path, tiny):
    model = CausalLM.from_config(tiny, seed=1)
    done = export_weights(model_weights(model), tmp_path / "out", dtype=torch.bfloat16)
    assert done.dtype == torch.bfloat16
    expected = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert_same_tensors(folder_tensors(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert any("no tokenizer" in note for note in done.notes)


def test_the_folder_is_complete(tmp_path, tiny):
    config = replace(tiny, vocab_size=320)
    run = write_checkpoint(tmp_path / "run", config, random_weights(config))
    (tmp_path / "run" / "tokenizer").mkdir()
    train(tmp_path / "run" / "tokenizer" / "tokenizer.model")
    done = export_weights(open_weights(run), tmp_path / "out")
    assert done.files == sorted(entry.name for entry in (tmp_path / "out").iterdir())
    assert set(done.files) == {
        "config.json", "configuration_internlm2.py", "generation_config.json", "model.safetensors",
        "modeling_internlm2.py", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["rope_theta"] == 1000000
    assert stored["rope_scaling"] is None
    assert stored["bias"] is False
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2
    export_weights(open_weights(tmp_path / "out"), tmp_path / "again")
    assert {entry.name for entry in (tmp_path / "again").iterdir()} == set(done.files)


def test_a_tokenizer_larger_than_the_weights_is_refused(tmp_path, source):
    train(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"has \d+ tokens, the weights have rows for 131"):
        export_weights(open_weights(source), tmp_path / "out", tokenizer=tmp_path / "tokenizer.model")
    assert not (tmp_path / "out").exists()


def test_dynamic_ntk_is_left_out_and_said(tmp_path, tiny):
    config = replace(tiny, rope_scaling=RopeScalingConfig("dynamic", 2.0))
    weights = model_weights(CausalLM.from_config(config))
    done = export_weights(weights, tmp_path / "a")
    assert any("dynamic NTK was left out" in note for note in done.notes)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["rope_scaling"] is None
    done = export_weights(weights, tmp_path / "b", keep_dynamic_rope=True)
    assert not any("dynamic" in note for note in done.notes)
    stored = json.loads((tmp_path / "b" / "config.json").read_text())
    assert stored["rope_scaling"] == {"type": "dynamic", "factor": 2.0}


def test_nothing_is_replaced_unless_asked(tmp_path, source, tiny):
    weights = open_weights(source)
    export_weights(weights, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds an export already"):
        export_weights(weights, tmp_path / "out")
    other = model_weights(CausalLM.from_config(tiny, seed=9))
    export_weights(other, tmp_path / "out", overwrite=True)
    assert_same_tensors(folder_tensors(tmp_path / "out"), dict(other))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ConfigError, match="is no export"):
        export_weights(weights, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, source, monkeypatch, overwrite):
    weights = open_weights(source)
    if overwrite:
        export_weights(weights, tmp_path / "out")
    before = folder_tensors(tmp_path / "out") if overwrite else None
    calls = []

    def full(writer, name, tensor):
        calls.append(name)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module.SafetensorsWriter, "write", full)
    with pytest.raises(ConfigError, match="could not be written: No space left on device"):
        export_weights(weights, tmp_path / "out", overwrite=overwrite)
    assert len(calls) == 3
    assert {entry.name for entry in tmp_path.iterdir()} == {"source"} | ({"out"} if overwrite else set())
    if overwrite:
        assert_same_tensors(folder_tensors(tmp_path / "out"), before)


def test_one_tensor_in_memory_at_a_time(tmp_path, source):
    weights = open_weights(source)
    alive, most = [], []
    import weakref

    def read(name):
        tensor = weights.read(name)
        alive.append(weakref.ref(tensor))
        most.append(sum(ref() is not None for ref in alive))
        return tensor

    export_weights(replace(weights, read=read), tmp_path / "out")
    assert len(most) == len(weights.dtypes)
    assert max(most) <= 2  # the one being written and the one just read


def test_import_from_any_llama(tmp_path, tiny):
    """A transformers-5 spelling with the theta inside rope_parameters, head_dim away from hidden / heads."""
    config = replace(tiny, head_dim=24, rope_base=5e4)
    weights = random_weights(config)
    folder = write_llama(
        tmp_path / "a", config, to_llama(config, weights), rope_theta=None,
        rope_parameters={"rope_theta": 5e4, "rope_type": "default"},
    )  # fmt: skip
    export_weights(open_weights(folder), tmp_path / "b")
    found = open_weights(tmp_path / "b")
    assert (found.config.head_dim, found.config.rope_base) == (24, 5e4)
    assert_same_tensors(dict(found), weights)


def test_a_model_in_training_replaces_its_own_export(tmp_path, tiny):
    """In any order of tensors, as an engine hands them out; a missing or unknown one leaves the old export."""
    for seed in (1, 2):
        model = CausalLM.from_config(tiny, seed=seed)
        tensors = list(model.state_dict().items())
        export(tmp_path / "out", tiny, reversed(tensors), dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in tensors}
    with pytest.raises(ConfigError, match=r"output\.weight was not given"):
        export(tmp_path / "out", tiny, tensors[:-1], dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"extra\.weight was given for export"):
        export(tmp_path / "out", tiny, [*tensors, ("extra.weight", torch.ones(1))], dtype=torch.bfloat16)
    assert_same_tensors(folder_tensors(tmp_path / "out"), expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
