"""The reward model's stage, in this process where nothing has to be killed: training, hand-over, resume, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from internlm2.config import ConfigError
from internlm2.config.compose import CONF, register_schema, to_config
from internlm2.config.reward import check_reward
from internlm2.model import CausalLM
from internlm2.model.export import export_weights
from internlm2.model.weights import model_weights, open_weights
from internlm2.rlhf.scoring import RewardScorer
from internlm2.sources.toy_tokenizer import write_tokenizer
from internlm2.stages.recipe import run_stages
from internlm2.text.chat import Message
from tests.stages.conftest import REPOSITORY

WORDS = ["sun", "sea", "tree", "bird", "stone", "rain"]
SETTINGS = [
    "stage=rm", "model=micro", "model.layers=2", "model.hidden_size=32", "model.heads=2", "model.kv_heads=1",
    "model.head_dim=16", "model.intermediate_size=48", "data=my_preferences", "~data.sources.safety",
    "~data.sources.mathematics", "~data.weights.rm.safety", "~data.weights.rm.mathematics", "data.workers=1",
    "data.validation_fraction=0.2", "engine.dtype=fp32", "engine.threads=1", "train.seq_len=64",
    "train.batch_tokens=512", "optim.lr=5e-3", "checkpoint.every=4", "checkpoint.asynchronous=false", "name=r",
    "reward.conditions={helpful: judge helpful, brief: judge brief, default: ''}", "optim.schedule=constant",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Of two domains with contradicting tastes: helpful likes the longer answer, brief the shorter one."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for i in range(80):
        a, b = WORDS[i % 6], WORDS[(i // 6) % 6]
        prompt, long, short = f"{a} {b} {WORDS[i % 5]}", f"{a} {b} " + " ".join(WORDS[: i % 4 + 1]), a
        lines.append({"prompt": prompt, "chosen": long, "rejected": short, "domain": "helpful"})
        lines.append({"prompt": prompt, "chosen": short, "rejected": long, "domain": "brief"})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """An SFT model with the toy vocabulary, as an export."""
    folder = tmp_path_factory.mktemp("start")
    write_tokenizer(folder / "tokenizer")
    model = CausalLM.from_config(config(folder, folder / "x.jsonl", None).model, seed=3)
    return export_weights(model_weights(model, folder / "tokenizer"), folder / "sft").folder


def overrides(root: Path, pairs: Path, start: Path | None, *more: str) -> list[str]:
    source = ["init_from=null", "data.tokenizer.kind=toy"] if start is None else [f"init_from={start}"]
    return [*SETTINGS, *source, f"data.sources.dialogs.path={pairs}", f"root={root}", f"data.cache_dir={root}/c", *more]


def config(root: Path, pairs: Path, start: Path | None, *more: str):
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("train", overrides=overrides(root, pairs, start, *more)))


def train(root: Path, pairs: Path, start: Path | None, *more: str) -> Path:
    run_stages([config(root, pairs, start, *more)])
    return root / "r/rm"


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pairs, start) -> Path:
    return train(tmp_path_factory.mktemp("run"), pairs, start, "train.steps=40", "validate.every=20")


def test_conditions_are_learned_and_everything_is_written(trained, start):
    last = records(trained)[-1]
    assert last["loss"] == pytest.approx(last["ranking_loss"] + 0.02 * last["barrier"], abs=1e-6)
    assert {"pairs", "accuracy", "margin", "score_mean"} <= last.keys()
    settings = json.loads((trained / "reward.json").read_text())
    for domain in ("helpful", "brief"):
        other = {"helpful": "brief", "brief": "helpful"}[domain]
        assert settings["domains"][domain]["accuracy"] > 0.9
        assert settings["swap"][domain][other] < 0.5  # told the contrary, it judges the contrary
        assert last["validation"][domain]["accuracy"] == settings["domains"][domain]["accuracy"]
    assert settings["blind_bound"]["all"] == 0.5  # of a reader that cannot see the domain
    assert (trained / "evaluation/reward_accuracy.json").exists()
    scorer = RewardScorer.load(trained / "export")
    assert scorer.statistics.std == settings["score"]["std"] > 0
    talk = [Message("user", "sun sea"), Message("assistant", "sun sea tree bird")]
    short = [Message("user", "sun sea"), Message("assistant", "sun")]
    helpful, brief = scorer.score([talk, short], ["helpful"] * 2), scorer.score([talk, short], ["brief"] * 2)
    assert helpful[0] > helpful[1]
    assert brief[0] < brief[1]
    again = RewardScorer.load(trained, dtype=torch.float32)  # the checkpoint of the same run
    assert again.score([talk], ["helpful"]) == pytest.approx(helpful[:1], abs=1e-5)
    assert load_file(trained / "export/model.safetensors")["v_head.weight"].shape == (1, 32)
    row = next(row for row in json.loads((trained / "handover.json").read_text()) if row["key"] == "v_head")
    assert row["inherited"] == "none"


def test_the_unconditional_model_cannot_serve_both(tmp_path, pairs, start):
    run = train(tmp_path, pairs, start, "reward=unconditional", "train.steps=40")
    settings = json.loads((run / "reward.json").read_text())
    accuracies = [found["accuracy"] for found in settings["domains"].values()]
    assert sum(accuracies) / 2 == pytest.approx(0.5)
    assert settings["conditions"] == {}


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path, pairs, start):
    steps = ["train.steps=24", "checkpoint.export=false"]
    whole = train(tmp_path / "whole", pairs, start, *steps)
    command = [sys.executable, "train.py", *overrides(tmp_path / "parts", pairs, start, *steps)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "parts/r/rm/metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 6):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(records(metrics.parent)) < 24
    parts = train(tmp_path / "parts", pairs, start, *steps)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (parts / "reward.json").read_bytes() == (whole / "reward.json").read_bytes()
    ends = [dict(open_weights(run)) for run in (whole, parts)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_adapters_train_with_a_whole_head(tmp_path, pairs, start, adapter):
    run = train(tmp_path, pairs, start, f"adapter={adapter}", "adapter.rank=4", "train.steps=3", "optim.lr=0.01")
    stored = load_file(run / "adapter/adapter_model.safetensors")
    assert "base_model.model.v_head.weight" in stored
    assert json.loads((run / "adapter/adapter_config.json").read_text())["modules_to_save"] == ["v_head"]
    assert torch.equal(dict(open_weights(run / "export"))["v_head.weight"], stored["base_model.model.v_head.weight"])
    talk = [Message("user", "sun sea"), Message("assistant", "sun")]
    assert RewardScorer.load(run).score([talk], ["brief"]) == RewardScorer.load(run / "export").score([talk], ["brief"])


def test_bad_records_are_named_and_skipped_or_refused(tmp_path, pairs):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(pairs.read_text() + '{"prompt": "sun", "chosen": "sea", "rejected": " "}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:161 \(rejected is empty\)"):
        train(tmp_path / "strict", bad, None, "data.strict=true", "train.steps=1")
    run = train(tmp_path / "loose", bad, None, "train.steps=1", "checkpoint.export=false")
    assert "bad.jsonl:161 (rejected is empty); skipped" in (run / "log.txt").read_text()


def test_a_domain_without_a_condition_is_refused(tmp_path, pairs):
    lone = tmp_path / "lone.jsonl"
    lone.write_text(pairs.read_text().replace("brief", "poetry"), encoding="utf-8")
    with pytest.raises(ConfigError, match="no entry for domain 'poetry'"):
        train(tmp_path, lone, None, "train.steps=1")


def test_a_vocabulary_without_reward_token_is_named_or_lends_a_spare_piece(tmp_path, pairs, start):
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder)
    # The official vocabulary's spare piece would serve by itself.
    content = (folder / "tokenizer.json").read_text().replace("[UNUSED_TOKEN_130]", "[SPARE_130]")
    (folder / "tokenizer.json").write_text(content.replace("<|reward|>", "<|nothing|>"))
    weights = open_weights(start)
    plain = export_weights(weights, tmp_path / "plain", tokenizer=folder).folder
    with pytest.raises(ConfigError, match=r"no token for <\|reward\|>.*data\.tokenizer\.aliases"):
        train(tmp_path / "a", pairs, plain, "train.steps=1")
    (folder / "tokenizer.json").write_text(content.replace("<|reward|>", "<reponame>"))
    spare = export_weights(weights, tmp_path / "spare", tokenizer=folder).folder
    run = train(tmp_path / "b", pairs, spare, "train.steps=1")
    assert json.loads((run / "tokenizer/tokenizer_aliases.json").read_text()) == {"<|reward|>": "<reponame>"}
    rows = json.loads((run / "handover.json").read_text())
    assert next(row["note"] for row in rows if row["key"] == "tokenizer") == "same file, with <|reward|>"
    exported = json.loads((run / "export/config.json").read_text())
    assert exported["reward_token_id"] == json.loads((run / "reward.json").read_text())["reward_token_id"]
    assert RewardScorer.load(run / "export").score([[Message("user", "sun"), Message("assistant", "sea")]], ["brief"])


def test_settings_that_cannot_work_are_refused(tmp_path, pairs):
    for change, words in (
        ("train.batch_tokens=100", "must hold a pair of the greatest length"),
        ("reward.barrier.eps=9", r"reward\.barrier\.eps=9"),
        ("reward.loss=hinge", r"reward\.loss=hinge is not one of focal, plain"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(tmp_path, pairs, None, change)
    with pytest.raises(ConfigError, match="needs the group reward"):
        check_reward(None, 64, 128)
