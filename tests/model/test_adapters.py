"""LoRA and QLoRA: the function, the files, merging, and training through the engine's named parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import internlm2
from internlm2.config import AdapterConfig, ConfigError, OptimConfig
from internlm2.data.batch import collate
from internlm2.data.rows import Row
from internlm2.engine.base import LossSum
from internlm2.engine.single import SingleEngine
from internlm2.model import adapters
from internlm2.model.export import export_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import load_model, model_weights
from internlm2.ops.quantized import dequantize_weight

peft = pytest.importorskip("peft")
IDS = torch.tensor([5, 9, 3, 77, 20, 11, 64, 130])
CU = torch.tensor([0, 5, 8], dtype=torch.int32)


def settings(kind="lora", **changes):
    values = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": list(adapters.TARGETS), "bits": 4} | changes
    return AdapterConfig(kind=kind, **values)


def adapted(tiny, config, seed=0):
    """A model whose adapters do something: B drawn as well."""
    model = adapters.add_adapters(CausalLM.from_config(tiny, seed=1, attention="reference"), config, seed)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapters.adapter_parameters(model):
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, CU)


def test_fresh_adapters_change_nothing_and_train_nothing_else(tiny):
    plain = CausalLM.from_config(tiny, seed=1, attention="reference")
    before = logits(plain)
    state = torch.get_rng_state()
    model = adapters.add_adapters(CausalLM.from_config(tiny, seed=1, attention="reference"), settings(), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in adapters.adapter_parameters(model)}
    assert len(trained) == 2 * 5 * 2
    assert "model.layers.1.attention.wqkv.lora_A.default.weight" in trained
    again = adapters.add_adapters(CausalLM.from_config(tiny, seed=1), settings(), 0)
    other = adapters.add_adapters(CausalLM.from_config(tiny, seed=1), settings(), 1)
    for (name, a), (_, b), (_, c) in zip(*map(adapters.adapter_parameters, (model, again, other))):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (".lora_B." in name)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base_is_close_and_passes_the_gradient(bits):
    weight = torch.randn(80, 48, generator=torch.Generator().manual_seed(0)) * 0.02
    linear = adapters.QuantizedLinear(weight, bits)
    assert not list(linear.parameters())
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).bfloat16().float().requires_grad_()
    out = linear(x)
    stands_for = dequantize_weight(linear.quantized, torch.float32)
    assert (stands_for - weight).norm() / weight.norm() < (0.15 if bits == 4 else 0.01)
    torch.testing.assert_close(out, x @ stands_for.t(), rtol=1e-4, atol=1e-5)
    grad = torch.randn(7, 80, generator=torch.Generator().manual_seed(2))
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ stands_for, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_merged_export_has_equal_logits(tiny, tmp_path, kind):
    config = settings(kind)
    model = adapted(tiny, config)
    expected = logits(model)
    export_weights(adapters.merged_weights(model, config), tmp_path / "merged")
    merged = load_model(tmp_path / "merged", attention="reference")
    # A quantised product rounds its activations to bfloat16; the merged model does not.
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 if kind == "lora" else 2e-2)
    base = model_weights(CausalLM.from_config(tiny, seed=1))
    adapters.save_adapter(tmp_path / "adapter", config, tiny, adapters.adapter_parameters(model))
    from_files = adapters.adapted_weights(base, tmp_path / "adapter")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(from_files.dtypes) == set(stored)
    for name, tensor in from_files:
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=1e-6)
    changed = [name for name in stored if not torch.equal(stored[name], base.read(name))]
    assert len(changed) == 10


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_saved_adapters_come_back(tiny, tmp_path, kind):
    config = settings(kind, targets=["wqkv", "w2"], bits=8)
    model = adapted(tiny, config)
    adapters.save_adapter(tmp_path, config, tiny, adapters.adapter_parameters(model), base="internlm2-7b")
    fresh = CausalLM.from_config(tiny, seed=1, attention="reference")
    read = adapters.load_adapter(fresh, tmp_path)
    assert (read.kind, read.rank, read.alpha, sorted(read.targets)) == (kind, 3, 6.0, ["w2", "wqkv"])
    assert torch.equal(logits(fresh), logits(model))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["peft_type"]) == (3, 6.0, "LORA")
    assert written["base_model_name_or_path"] == "internlm2-7b"
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.attention.wqkv.lora_B.weight" in names


def test_peft_loads_the_files_on_the_plain_model(tiny, tmp_path):
    config = settings()
    model = adapted(tiny, config)
    adapters.save_adapter(tmp_path, config, tiny, adapters.adapter_parameters(model))
    plain = CausalLM.from_config(tiny, seed=1, attention="reference")
    plain.config = type("Config", (dict,), {"model_type": "internlm2"})()  # peft asks a language model for its type
    plain.prepare_inputs_for_generation = None  # and keeps this method, which only generation calls
    wrapped = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(wrapped.base_model.model(IDS, CU), logits(model), rtol=0, atol=1e-6)


def test_peft_loads_the_llama_layout_in_transformers(tiny, tmp_path):
    """The registered model computes with q, k and v apart: the adapter's B is cut into their rows."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    assert internlm2.__file__
    config = settings()
    model = adapted(tiny, config)
    export_weights(model_weights(CausalLM.from_config(tiny, seed=1)), tmp_path / "base")
    adapters.save_adapter(
        tmp_path / "adapter",
        config,
        tiny,
        adapters.adapter_parameters(model),
        base=str(tmp_path / "base"),
        layout="llama",
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    with torch.no_grad():
        found = theirs(IDS[None, :5]).logits[0]
    torch.testing.assert_close(found, logits(model)[:5], rtol=0, atol=1e-4)
    export_weights(adapters.merged_weights(model, config), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS[None, :5]).logits[0], found, rtol=0, atol=1e-4)


def test_one_command_merges(tiny, tmp_path):
    config = settings()
    model = adapted(tiny, config)
    export_weights(model_weights(CausalLM.from_config(tiny, seed=1)), tmp_path / "base")
    adapters.save_adapter(tmp_path / "adapter", config, tiny, adapters.adapter_parameters(model))
    command = [
        sys.executable,
        "-m",
        "internlm2.convert",
        str(tmp_path / "base"),
        "--adapter",
        str(tmp_path / "adapter"),
    ]
    root = Path(internlm2.__file__).parents[1]
    subprocess.run([*command, "--to", "internlm2", "--output", str(tmp_path / "out")], check=True, cwd=root)
    merged = load_model(tmp_path / "out", attention="reference")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


def a_row():
    ids = IDS.numpy()
    labels = F.pad(IDS[1:], (0, 1), value=-100)
    labels[4] = -100
    return Row(ids, labels.numpy(), CU.numpy(), torch.zeros(2).int().numpy(), torch.arange(2).numpy())


def token_loss(model, batch):
    return LossSum(model(batch.ids, batch.cu_seqlens, batch.max_seqlen, batch.labels), batch.loss_tokens)


OPTIM = OptimConfig(
    lr=2e-2, min_lr_ratio=1.0, schedule="constant", schedule_start=0.0, schedule_end=1.0, warmup_ratio=0.0, beta1=0.9,
    beta2=0.95, eps=1e-8, weight_decay=0.0, decay_embeddings=False, clip_grad_norm=1.0,
)  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), [("lora", "fp32"), ("lora", "bf16"), ("qlora", "fp32"), ("qlora", "bf16")])
def test_the_engine_trains_adapters_only(tiny, kind, dtype):
    model = CausalLM.from_config(tiny, seed=1, attention="reference", recompute="full")
    adapters.add_adapters(model, settings(kind, dropout=0.1), 0)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" not in name}
    engine = SingleEngine(model, OPTIM, 8, "cpu", dtype, "skip", None, 1)
    batch = collate([a_row()])
    first = engine.evaluate([batch], token_loss).loss
    for step in range(8):
        adapters.set_dropout_step(model, step)
        engine.train_step([batch], token_loss)
    assert engine.evaluate([batch], token_loss).loss < first - 0.2
    assert set(engine.shapes()) == {name for name, _ in adapters.adapter_parameters(model)}
    for name, tensor in frozen.items():
        now = model.state_dict()[name]
        assert torch.equal(now, tensor.to(now.dtype)), name


def test_dropout_is_a_function_of_step_and_input():
    dropout = adapters.Dropout(0.3, 5)
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    first = dropout(x)
    assert torch.equal(dropout(x), first)
    assert abs((first == 0).float().mean().item() - 0.3) < 0.01
    kept = first != 0
    torch.testing.assert_close(first[kept], x[kept] / 0.7)
    dropout.step = 1
    both = ((dropout(x) == 0) & ~kept).float().mean().item()
    assert abs(both - 0.09) < 0.01  # independent of the mask before
    same = torch.ones(200, 300)
    assert abs((dropout(same) == 0).float().mean(0) - 0.3).max() < 0.2
    assert torch.equal(dropout.eval()(x), x)


def test_wrong_wishes_are_one_sentence(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"adapter\.targets names q_proj: choose from wqkv"):
        adapters.add_adapters(CausalLM.from_config(tiny), settings(targets=["q_proj"]), 0)
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        adapters.read_adapter(tmp_path)
    config = settings()
    model = adapted(tiny, config)
    adapters.save_adapter(tmp_path / "llama", config, tiny, adapters.adapter_parameters(model), layout="llama")
    with pytest.raises(ConfigError, match="only plain LoRA on wqkv, wo, w1, w2, w3 can be used here, but it adapts"):
        adapters.read_adapter(tmp_path / "llama")
    adapters.save_adapter(tmp_path / "small", settings(rank=3), tiny, adapters.adapter_parameters(model))
    (tmp_path / "small" / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 1, "target_modules": list(adapters.TARGETS)})
    )
    with pytest.raises(ConfigError, match=r"has shape"):
        adapters.load_adapter(CausalLM.from_config(tiny), tmp_path / "small")


def test_adapters_off_is_the_function_of_the_frozen_weights(tiny):
    plain, model = CausalLM.from_config(tiny, seed=1, attention="reference"), adapted(tiny, settings())
    before, trained = plain(IDS, CU), model(IDS, CU)
    assert (trained - before).abs().max() > 0.01
    with adapters.adapters_off(model):
        assert torch.equal(model(IDS, CU), before)
    assert torch.equal(model(IDS, CU), trained)
    assert all(parameter.requires_grad for _, parameter in adapters.adapter_parameters(model))
