"""Rounds of PPO with models, in process: what a run leaves, and that a kill in any of its phases changes nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from internlm2.config import ConfigError
from internlm2.config.compose import CONF, register_schema, to_config
from internlm2.model.export import export_weights
from internlm2.model.transformer import CausalLM
from internlm2.model.weights import model_weights
from internlm2.rlhf.answers import read_answers, read_lines
from internlm2.run.directory import RunDirectory
from internlm2.run.report import write_report
from internlm2.sources import toy_language as toy
from internlm2.sources.toy_tokenizer import write_tokenizer
from internlm2.stages import ppo, ppo_round, reward, round_models
from internlm2.stages.preparation import is_complete
from tests.stages.conftest import REPOSITORY

SMALL = [
    "preset=toy",
    "model=micro",
    "model.hidden_size=32",
    "model.layers=1",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_dim=16",
    "model.intermediate_size=48",
    "data=toy_language",
    "engine.device=cpu",
    "engine.threads=1",
    "run.samples=[]",
]
PPO = [
    "prompts=toy_language",
    "ppo.iterations=4",
    "ppo.critic_warmup=1",
    "ppo.prompts_per_iteration=12",
    "ppo.minibatches=1",
    "ppo.pretrain.coefficient=0.0",
    "ppo.rollout.max_new_tokens=8",
    "ppo.validation.every=2",
    "ppo.validation.rows=9",
    "checkpoint.every=1",
    "rounds.count=2",
    "rounds.prompts=24",
    "rounds.annotation.comparisons=20",
    "train.seq_len=64",
    "train.batch_tokens=64",
    "train.micro_batch=1",
]


def composed(*overrides):
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("train", overrides=[*SMALL, *overrides]))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run with a random policy as its SFT stage, and a reward model that has seen a few pairs."""
    root = tmp_path_factory.mktemp("rounds")
    write_tokenizer(root / "tokenizer")
    folder = root / "run" / "sft"
    model = CausalLM.from_config(composed("stage=sft", "init_from=null").model, seed=3)
    export_weights(model_weights(model), folder, tokenizer=root / "tokenizer")
    config = composed(
        "stage=rm", f"root={root}", "name=run", "train.epochs=0.02", "data.weights.audit.audit_preferences=0.02"
    )
    code = reward.run(config, RunDirectory(root / "run" / "rm"), Console(quiet=True))
    assert code == 0
    return root


def run(start: Path, root: Path, *overrides: str) -> Path:
    """`ppo.run` in a copy of the start; returns the stage's directory."""
    if not root.exists():
        shutil.copytree(start, root)
    config = composed("stage=ppo", f"root={root}", "name=run", f"data.cache_dir={start}/cache", *PPO, *overrides)
    directory = RunDirectory(root / "run" / "ppo")
    assert ppo.run(config, directory, Console(quiet=True)) == 0
    assert is_complete(directory, config)
    return directory.path


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    return run(start, tmp_path_factory.mktemp("whole") / "root")


def test_every_round_leaves_its_state(whole):
    for number in (1, 2):
        folder = whole / f"round_{number}"
        done = json.loads((folder / "round.json").read_text())
        assert done["round"] == number
        assert done["comparisons"] == 20
        assert {"gold", "score", "audit", "tokens"} <= done["fixed"]["late"].keys()
        assert set(done["fixed"]["late"]["gold_by_domain"]) == set(toy.DOMAINS)
        assert (folder / "policy" / "finished.json").exists()
        assert len(read_answers(folder / "answers" / "late.jsonl")) == 24
    assert not (whole / "round_1" / "reward").exists()
    assert (whole / "round_2" / "reward" / "finished.json").exists()
    assert (whole / "export").resolve() == (whole / "round_2" / "policy" / "export").resolve()


def test_more_rounds_go_on(whole):
    lines = ppo.describe_rounds(whole)
    assert [line.split()[:3] for line in lines] == [["ppo", "round", "1"], ["ppo", "round", "2"]]
    assert all("gold" in line and "score" in line for line in lines)
    directory = RunDirectory(whole)
    assert is_complete(directory, composed("stage=ppo", *PPO))
    assert not is_complete(directory, composed("stage=ppo", *PPO, "rounds.count=3"))


def test_the_second_reward_model_has_seen_the_labels(whole):
    pairs = read_lines(whole / "round_2" / "preferences" / "reward" / "round_1_slow.jsonl")
    assert pairs
    assert all([turn["role"] for turn in pair["prompt"]] == ["user"] for pair in pairs)
    sources = {row["source"]: row for row in json.loads((whole / "round_2" / "reward" / "data.json").read_text())}
    assert set(sources) == {"preferences", "round_1_slow"} | ({"round_1_fast"} & set(sources))
    seen = sources["round_1_slow"]
    assert seen["pairs"] + seen["held_out_pairs"] + seen["repeated"] + seen["equal"] == len(pairs)
    audit = {row["source"] for row in json.loads((whole / "round_1" / "audit" / "data.json").read_text())}
    assert audit == {"audit_preferences"}


def test_no_condition_and_no_manner_reaches_the_wrong_model(whole):
    """Policies are asked with the manner and without a condition; the reward model's pairs have neither."""
    for answer in read_answers(whole / "round_1" / "answers" / "late.jsonl"):
        assert answer.prompt[0].content == toy.MANNERS[answer.domain]
        assert not {"judge", *toy.DOMAINS} & {word for turn in answer.prompt for word in turn.content.split()}


def test_the_report_shows_the_rounds(whole):
    text = write_report(whole.parent).read_text()
    for title in ("Gold reward by domain", "What each round found and decided", "round_2"):
        assert title in text


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


KILLS = {
    "in the first round's PPO": (ppo_round, "run_iteration", 3),
    "while it answers": (round_models.RoundModels, "answers", 2),
    "while the second reward model is trained": (reward, "conclude", 1),
    "in the second round's PPO": (ppo_round, "run_iteration", 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("when", KILLS)
def test_a_kill_in_any_phase_changes_nothing(start, whole, tmp_path, monkeypatch, when):
    owner, name, count = KILLS[when]
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(Killed):
        run(start, tmp_path / "root")
    monkeypatch.undo()
    again = run(start, tmp_path / "root")
    files = [path.relative_to(whole) for path in whole.rglob("*.jsonl") if path.name != "timing.jsonl"]
    files += [path.relative_to(whole) for path in whole.rglob("hacks.json")]
    assert len(files) > 20
    for file in files:
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file


# Lines of a file of the stage's directory at which a process is killed from outside, phase after phase.
MOMENTS = (
    ("round_1/policy/metrics.jsonl", 3),
    ("round_1/answers/sft.jsonl", 1),
    ("round_2/preferences/reward/round_1_slow.jsonl", 1),
    ("round_2/policy/metrics.jsonl", 2),
)


def process(start: Path, root: Path) -> subprocess.Popen:
    """The command line of the same run, in a process of its own."""
    if not root.exists():
        shutil.copytree(start, root)
    named = ["stage=ppo", f"root={root}", "name=run", f"data.cache_dir={start}/cache"]
    command = [sys.executable, "train.py", *SMALL, *PPO, *named]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_at(running: subprocess.Popen, file: Path, lines: int) -> None:
    """kill -9 as soon as the file has so many lines."""
    deadline = time.monotonic() + 600
    while not (file.exists() and len(file.read_bytes().splitlines()) >= lines):
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.kill()
    assert running.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_kill_9_in_phase_after_phase_changes_nothing(start, tmp_path):
    whole, again = (tmp_path / name / "run" / "ppo" for name in ("whole", "again"))
    straight = process(start, tmp_path / "whole")
    assert straight.wait() == 0, straight.communicate()[1]
    for file, lines in MOMENTS:
        kill_at(process(start, tmp_path / "again"), again / file, lines)
    last = process(start, tmp_path / "again")
    assert last.wait() == 0, last.communicate()[1]
    files = [path.relative_to(whole) for path in whole.rglob("*.jsonl") if path.name != "timing.jsonl"]
    assert len(files) > 20
    for file in files:
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file
    weights = [path.relative_to(whole) for path in whole.glob("round_*/policy/export/*.safetensors")]
    assert len(weights) == 2
    for file in weights:
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_reward_model_that_cannot_be_trained_again(start, tmp_path):
    shutil.copytree(start, tmp_path / "root")
    (tmp_path / "root/run/rm/config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        run(start, tmp_path / "root")


def test_an_audit_model_needs_pairs_of_its_own(start, tmp_path):
    shutil.copytree(start, tmp_path / "root")
    file = tmp_path / "root/run/rm/config.yaml"
    file.write_text(file.read_text().replace("audit_preferences: 0.02", "preferences: 0.02"))
    with pytest.raises(ConfigError, match="the audit model must see other pairs"):
        run(start, tmp_path / "root")
