"""Each mistake is one clear sentence and a non-zero exit, and nothing that was saved before is damaged."""

import hashlib
import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.stages.conftest import REPOSITORY

STAGE = Path("smoke/pretrain_4k")


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> Path:
    """A run of five steps that is complete."""
    root = tmp_path_factory.mktemp("finished")
    subprocess.run(command(root, "train.steps=5"), cwd=REPOSITORY, check=True, capture_output=True)
    return root


def digest(folder: Path) -> str:
    """One hash of all files in a checkpoint folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def assert_refused(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    message = (done.stderr + done.stdout)[-1500:]
    assert "Traceback" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.sources.only.path=/nowhere/x.jsonl"], ["/nowhere/x.jsonl"]),
        (["init_from=/nowhere/checkpoint"], ["init_from=/nowhere/checkpoint", "exists"]),
        (["engine.device=cuda"], ["engine.device=cuda"]),
        (["engine.attention=flash_attn"], ["flash_attn"]),
        (["model.vocab_size=60000", "data.tokenizer.vocab_size=60000"], ["vocab"]),
    ],
)
def test_refused_before_training(run, tmp_path, overrides, words):
    assert_refused(run(tmp_path, *overrides), *words)
    assert not list(tmp_path.rglob("step_*"))


def test_empty_corpus(run, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert_refused(run(tmp_path, f"data.sources.only.path={empty}"), str(empty))


def test_a_bad_line_is_named_and_refused_when_strict(run, corpus, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(corpus.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    assert_refused(run(tmp_path, f"data.sources.only.path={file}", "data.strict=true"), "bad.jsonl:301")


def test_changed_data(run, corpus, finished):
    saved = finished / STAGE / "checkpoints"
    before = digest(saved)
    changed = finished / "changed.jsonl"
    changed.write_text(
        corpus.read_text(encoding="utf-8") + json.dumps({"text": "another document"}) + "\n", encoding="utf-8"
    )
    assert_refused(run(finished, "train.steps=6", f"data.sources.only.path={changed}"), "data.on_change=accept")
    assert digest(saved) == before


def test_another_shape_or_vocabulary(run, finished):
    saved = finished / STAGE / "checkpoints"
    before = digest(saved)
    assert_refused(run(finished, "train.steps=6", "model.intermediate_size=128"), "feed_forward", "96", "128", code=1)
    assert_refused(
        run(finished, "name=other", f"init_from={finished / STAGE}", "model.layers=3"),
        "model.layers=2",
        "model.layers=3",
    )
    vocabulary = ["model.vocab_size=600", "data.tokenizer.vocab_size=600"]
    assert_refused(
        run(finished, "name=third", f"init_from={finished / STAGE}", *vocabulary), "vocab_size=512", "vocab_size=600"
    )
    assert digest(saved) == before


def test_resume_false_refuses_to_go_over_a_run(run, finished):
    assert_refused(run(finished, "train.steps=6", "resume=false"), "resume=false", "another name=")


def test_all_checkpoints_corrupted(run, command, tmp_path):
    subprocess.run(command(tmp_path, "train.steps=5"), cwd=REPOSITORY, check=True, capture_output=True)
    for file in (tmp_path / STAGE / "checkpoints").rglob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    assert_refused(run(tmp_path, "train.steps=6"), "corrupted", "move them away", code=1)


def test_two_runs_in_one_directory(run, command, tmp_path):
    first = subprocess.Popen(command(tmp_path, "train.steps=100000"), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / STAGE / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert_refused(run(tmp_path, "train.steps=100000"), "in use by another run", str(first.pid))
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


def test_full_disk(run, command, tmp_path):
    """The checkpoint file may not grow past 100 KB: the kernel's answer is an error from write, as on a full disk."""
    subprocess.run(command(tmp_path, "train.steps=5"), cwd=REPOSITORY, check=True, capture_output=True)
    saved = tmp_path / STAGE / "checkpoints"
    before = digest(saved)
    limited = ["bash", "-c", 'ulimit -f 100; trap "" XFSZ; exec "$@"', "bash", *command(tmp_path, "train.steps=12")]
    done = subprocess.run(limited, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert_refused(done, "was not saved", code=1)
    assert digest(saved) == before
