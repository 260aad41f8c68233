"""A command line that trains a very small model on a very small corpus, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]

TINY = [
    "stage=pretrain_4k",
    "preset=smoke",
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_dim=32",
    "model.intermediate_size=96",
    "train.seq_len=64",
    "train.micro_batch=2",
    "train.batch_tokens=256",
    "train.steps=30",
    "checkpoint.every=5",
    "checkpoint.export=false",
    "engine.dtype=fp32",
    "engine.threads=1",
    "run.samples=[]",
    "data.workers=1",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Three hundred short documents, long enough for a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [
        json.dumps({"text": f"def function_{i}(value):\n    return value * {i} + {i % 7}\n\n" * (1 + i % 5) + words(i)})
        for i in range(300)
    ]
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "code.jsonl"


def words(i: int) -> str:
    """Some text that differs from document to document."""
    return " ".join(f"{chr(97 + (i * j) % 26)}{chr(97 + (i + 3 * j) % 26)}{(i * j) % 100}" for j in range(1, 40))


@pytest.fixture(scope="session")
def command(corpus, tmp_path_factory) -> Callable[..., list[str]]:
    """`command(root, *overrides)` is the command line of a run below `root`; all share one cache of tokenized data."""
    group = tmp_path_factory.mktemp("conf") / "data"
    group.mkdir()
    data = yaml.safe_load((REPOSITORY / "conf/data/stdlib.yaml").read_text(encoding="utf-8"))
    data["sources"] = {"only": {"kind": "jsonl", "path": str(corpus)}}
    data["weights"] = {stage: {"only": 1.0} for stage in data["weights"]}
    data["cache_dir"] = str(tmp_path_factory.mktemp("cache"))
    (group / "lines.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")

    def build(root: Path, *overrides: str) -> list[str]:
        return [
            sys.executable,
            "train.py",
            "--config-dir",
            str(group.parent),
            *TINY,
            "data=lines",
            f"root={root}",
            *overrides,
        ]

    return build


@pytest.fixture
def run(command) -> Callable[..., subprocess.CompletedProcess]:
    """Run such a command to its end."""

    def finish(root: Path, *overrides: str) -> subprocess.CompletedProcess:
        return subprocess.run(command(root, *overrides), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)

    return finish
