"""Fine-tuning through the command line: all weights or adapters, answers before and after, exports that others load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from internlm2 import convert
from internlm2.model.weights import load_model
from tests.stages.conftest import REPOSITORY, TINY

STAGE = Path("smoke/sft")


@pytest.fixture(scope="module")
def base(command, tmp_path_factory) -> Path:
    """A pretrained model of five steps."""
    root = tmp_path_factory.mktemp("base")
    subprocess.run(command(root, "train.steps=5"), cwd=REPOSITORY, check=True, capture_output=True)
    return root / "smoke/pretrain_4k"


@pytest.fixture(scope="module")
def dialogs(tmp_path_factory) -> Path:
    """A configuration folder whose data=talk is sixty short conversations."""
    folder = tmp_path_factory.mktemp("dialogs")
    turns = [
        [{"role": "user", "content": f"add {i} and {i + 1}"}, {"role": "assistant", "content": f"it is {2 * i + 1}"}]
        for i in range(60)
    ]
    lines = "".join(json.dumps({"messages": turn}) + "\n" for turn in turns)
    (folder / "talk.jsonl").write_text(lines, encoding="utf-8")
    data = yaml.safe_load((REPOSITORY / "conf/data/docstrings.yaml").read_text(encoding="utf-8"))
    data["sources"] = {"talk": {"kind": "conversations", "path": str(folder / "talk.jsonl")}}
    data["weights"] = {"sft": {"talk": 1.0}}
    data["cache_dir"] = str(folder / "cache")
    (folder / "data").mkdir()
    (folder / "data/talk.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return folder


def tune(root: Path, base: Path, dialogs: Path, *overrides: str) -> subprocess.CompletedProcess:
    kept = [text for text in TINY if not text.startswith(("stage=", "run.samples", "checkpoint.export", "train.steps"))]
    command = [
        sys.executable, "train.py", "--config-dir", str(dialogs), "stage=sft", "data=talk", *kept, f"root={root}",
        f"init_from={base}", "train.steps=8", "run.samples=[add 3 and 4]", "run.sample_tokens=4", *overrides,
    ]  # fmt: skip
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("adapter", ["none", "lora", "qlora"])
def test_fine_tune_and_export(base, dialogs, tmp_path, adapter):
    shrink = [] if adapter == "none" else ["adapter.rank=4", "optim.lr=0.01"]
    done = tune(tmp_path, base, dialogs, f"adapter={adapter}", *shrink)
    assert done.returncode == 0, done.stderr
    run = tmp_path / STAGE
    samples = sorted(file.name for file in (run / "samples").glob("*.txt"))
    assert samples == ["step_00000000.txt", "step_00000008.txt"]
    assert (run / "samples" / samples[0]).read_text(encoding="utf-8").startswith("Q: add 3 and 4\nA: ")
    assert (run / "adapter" / "adapter_model.safetensors").exists() == (adapter != "none")
    # The export is the trained model: transformers and our own loader agree on it, and it is not the base.
    ids = torch.tensor([5, 17, 80, 33, 41])
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    theirs = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)(ids[None]).logits[0]
    ours = load_model(run / "export", dtype=torch.float32)(ids, bounds)
    before = load_model(base, dtype=torch.float32)(ids, bounds)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert (ours - before).abs().max() > 1e-4
    # The run itself is named to convert, not the export.
    assert convert.main([str(run), "--to", "llama", "--output", str(tmp_path / "llama")]) == 0
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    assert torch.allclose(ours, llama(ids[None]).logits[0], atol=1e-4)
    # It hands over to the next stage, with or without adapters.
    again = tune(tmp_path, run, dialogs, "name=again", "train.steps=1", "adapter=none")
    assert again.returncode == 0, again.stderr


def test_an_adapter_run_that_was_stopped_goes_on(base, dialogs, tmp_path):
    # A constant rate, so that a shorter stage is the beginning of the longer one.
    settings = [
        "adapter=lora",
        "adapter.rank=4",
        "adapter.dropout=0.1",
        "checkpoint.every=2",
        "optim.schedule=constant",
    ]
    settings += ["optim.warmup_ratio=0", "optim.lr=0.01"]
    assert tune(tmp_path / "whole", base, dialogs, *settings).returncode == 0
    assert tune(tmp_path / "parts", base, dialogs, *settings, "train.steps=4").returncode == 0
    assert tune(tmp_path / "parts", base, dialogs, *settings).returncode == 0
    records = [
        [(record["loss"], record["grad_norm"], record["position"]) for record in read_records(root)]
        for root in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 8


def read_records(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / STAGE / "metrics.jsonl").read_text().splitlines()]


def test_weights_without_a_tokenizer_are_refused(base, dialogs, tmp_path):
    done = tune(tmp_path, base, dialogs, "init_from=null")
    assert done.returncode == 2
    assert "data.tokenizer.kind=inherit needs init_from" in done.stderr
