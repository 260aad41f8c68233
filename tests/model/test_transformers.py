"""transformers 5 knows internlm2 after `import internlm2`, whatever was imported first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import internlm2
from internlm2.model.export import export_weights
from internlm2.model.weights import open_weights
from tests.model.checkpoint_folders import IDS, random_weights, write_official
from tests.model.trained_tokenizer import train
from tests.oracles import transformer as oracle

transformers = pytest.importorskip("transformers", minversion="5.0")
ROOT = Path(internlm2.__file__).resolve().parent.parent


def run(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def released(tmp_path, tiny):
    """A folder as the lab released it: remote code named everywhere, tokenizer.model alone."""
    from dataclasses import replace

    config = replace(tiny, vocab_size=320)
    auto_map = {"AutoConfig": "configuration_internlm2.Broken", "AutoModelForCausalLM": "modeling_internlm2.Broken"}
    folder = write_official(
        tmp_path / "released", config, random_weights(config), auto_map=auto_map, attn_implementation="eager"
    )
    train(folder / "tokenizer.model")
    names = {"AutoTokenizer": ["tokenization_internlm2.Broken", "tokenization_internlm2_fast.Broken"]}
    settings = {"auto_map": names, "tokenizer_class": "InternLM2Tokenizer", "decode_with_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>", "eos_token": "</s>"}))
    return folder, config


@pytest.mark.parametrize("trust", [None, True])
def test_released_folders_load_without_their_code(released, trust):
    folder, config = released
    weights = load_file(folder / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
    assert type(model).__module__ == "internlm2.model.huggingface.modeling_internlm2"
    assert model.config.rope_theta == 1e6
    with torch.no_grad():
        logits = model(IDS[None]).logits[0].double()
    torch.testing.assert_close(logits, oracle.logits(weights, config, IDS), rtol=0, atol=1e-4)


def test_saving_writes_the_official_names_bit_for_bit(released, tmp_path):
    folder, _ = released
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    expected, found = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert open_weights(tmp_path / "saved").config.rope_base == 1e6  # our reader knows transformers 5's own config.json


def test_the_backbone_alone(released):
    folder, _ = released
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "InternLM2Model"
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(IDS[None])[0], whole.model(IDS[None])[0])


@pytest.mark.parametrize("trust", [None, True])
def test_the_tokenizer_of_a_released_folder(released, trust):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder, _ = released
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("the cat  sat", "大模型 é👩‍👧\n\t x", ""):
        assert tokenizer(text).input_ids == [1, *reference.encode(text)]
        assert tokenizer.decode(reference.encode(text)) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}])["input_ids"]
    assert ids[:2] == [1, reference.piece_to_id("<|im_start|>")]


def test_importing_the_package_imports_nothing_heavy():
    done = run("import sys, internlm2; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


CHECK = """
import sys
{imports}
from transformers import AutoConfig, AutoModelForCausalLM
print(AutoConfig.from_pretrained(sys.argv[1]).__class__.__module__)
"""
FIRST = (
    "from transformers import AutoModelForCausalLM",
    "from transformers import LlamaForCausalLM",
    "from transformers.modeling_utils import PreTrainedModel",
    "from transformers.models.auto.tokenization_auto import AutoTokenizer",
)


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("order", ["before", "after"])
def test_any_order_of_imports(released, first, order):
    lines = ["import internlm2", first] if order == "before" else [first, "import internlm2"]
    done = run(CHECK.format(imports="\n".join(lines)), released[0])
    assert done.stdout.split() == ["internlm2.model.huggingface.configuration_internlm2"], done.stderr


@pytest.mark.slow
def test_an_export_opens_without_this_package(released, tmp_path):
    """The two model files in the folder stand alone: trust_remote_code=True, and no internlm2 to import."""
    folder, config = released
    export_weights(open_weights(folder), tmp_path / "out")
    code = """
import sys
sys.modules["internlm2"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer("the cat").input_ids[0] == 1
with torch.no_grad():
    torch.save(model(torch.tensor([[int(x) for x in sys.argv[3].split()]])).logits[0], sys.argv[2])
print(type(model).__module__)
"""
    done = run(code, tmp_path / "out", tmp_path / "logits.pt", " ".join(map(str, IDS.tolist())))
    assert "transformers_modules" in done.stdout, done.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True).double()
    expected = oracle.logits(load_file(folder / "model.safetensors"), config, IDS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
