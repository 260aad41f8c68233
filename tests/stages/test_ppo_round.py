"""One round of PPO in process: what is trained when, what may never change, what reaches which model, and resuming."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from internlm2.config import ConfigError
from internlm2.config.compose import CONF, register_schema, to_config
from internlm2.engine.checkpoint_reader import CheckpointReader
from internlm2.engine.guard import TrainingStopped
from internlm2.generation.engine import Engine
from internlm2.model.export import export_weights
from internlm2.model.scalar import ScalarModel, load_scalar_model
from internlm2.model.transformer import CausalLM, InternLM2
from internlm2.model.weights import load_model, model_weights
from internlm2.rlhf.rewards import RuleReward
from internlm2.rlhf.rollout import Sample
from internlm2.rlhf.scoring import RewardScorer
from internlm2.run.directory import RunDirectory
from internlm2.sources.toy_tokenizer import write_tokenizer
from internlm2.stages.ppo_models import build_models
from internlm2.stages.ppo_round import run_round
from internlm2.text.tokenizer import load_tokenizer

SHAPE = [
    "model=micro",
    "model.hidden_size=32",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_dim=16",
    "model.intermediate_size=48",
    "model.max_position_embeddings=128",
    "model.vocab_size=300",
    "model.initializer_range=0.25",
]
SMALL = [
    "stage=ppo",
    "data=toy_language",
    "prompts=toy_language",
    "engine.dtype=fp32",
    "engine.device=cpu",
    "train.seq_len=64",
    "train.batch_tokens=64",
    "optim.lr=1e-3",
    "checkpoint.every=1",
    "checkpoint.keep_last=20",
    "checkpoint.asynchronous=false",
    "ppo.reward.kind=rule",
    "ppo.reward.rule=toy_gold",
    "ppo.critic.init=policy",
    "ppo.critic.optim.lr=1e-3",
    "ppo.iterations=4",
    "ppo.critic_warmup=2",
    "ppo.prompts_per_iteration=12",
    "ppo.rollout.max_prompt_tokens=32",
    "ppo.rollout.max_new_tokens=10",
    "ppo.micro_batch_tokens=128",
    "ppo.validation.every=2",
    "ppo.validation.rows=6",
]


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ppo_cache")


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> Path:
    """A random policy as an export, with the toy language's tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    write_tokenizer(folder / "tokenizer")
    config = composed("init_from=null", "data.tokenizer.kind=toy")
    model = CausalLM.from_config(config.model, seed=3)
    export_weights(model_weights(model), folder / "export", tokenizer=folder / "tokenizer")
    return folder / "export"


def composed(*overrides):
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("train", overrides=[*SMALL, *SHAPE, *overrides]))


@pytest.fixture
def play(policy, caches, tmp_path):
    """`play(name, *overrides, **arguments)` runs a round in a directory of that name."""

    def run(name, *overrides, **arguments):
        config = composed(f"init_from={policy}", f"data.cache_dir={caches}", *overrides)
        directory = RunDirectory(tmp_path / name)
        given = {"policy": policy} | arguments
        with open(tmp_path / f"{name}.txt", "a", encoding="utf-8") as file:
            return run_round(config, directory, Console(file=file), **given), directory

    return run


def records(directory):
    return [json.loads(line) for line in directory.metrics.read_text().splitlines()]


def saved(directory, step):
    return CheckpointReader(directory.checkpoints / f"step_{step:08d}")


def test_a_round_from_end_to_end(play, policy):
    result, directory = play("whole")
    assert result.code == 0
    lines = records(directory)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line.get("phase") for line in lines[1:]] == ["critic_warmup"] * 2 + ["ppo"] * 4
    # The critic alone for exactly two iterations: the actor has the SFT weights bit for bit, its schedule stands still.
    start = dict(load_model(policy).named_parameters())
    for step in (1, 2):
        reader = saved(directory, step)
        assert reader.state["engine"]["engines"][""]["step"] == 0
        assert reader.state["engine"]["engines"]["critic."]["step"] == step
        for name, tensor in start.items():
            assert torch.equal(reader.full(name), tensor), name
            assert reader.full(name, "exp_avg").abs().max() == 0
    after = saved(directory, 3)
    assert after.state["engine"]["engines"][""]["step"] == 1
    assert any(not torch.equal(after.full(name), tensor) for name, tensor in start.items())
    assert not torch.equal(
        saved(directory, 1).full("critic.v_head.weight"), saved(directory, 2).full("critic.v_head.weight")
    )
    # Everything that a person asks for, per domain too.
    last = lines[-1]
    for key in ("score", "kl", "kl_exact", "entropy", "drift", "ratio", "clipped", "value_loss", "explained_variance"):
        assert key in last
    assert set(last["domains"]) == {"helpful", "harmless", "brief"}
    assert all(line["first_ratio_distance"] < 1e-5 for line in lines[3:])
    assert all(line["drift"]["kl"] < 1e-8 for line in lines[1:])
    assert last["pretrain_tokens"] > 0
    assert {"all", "helpful"} <= lines[0]["held_out"].keys()
    # KL is 0 until the actor moves; the export is a policy that others load; the frozen models are what they were.
    assert [abs(line["kl"]) < 1e-4 for line in lines[1:]] == [True] * 3 + [False] * 3
    finished = json.loads((directory.path / "finished.json").read_text())
    assert finished["frozen"] == saved(directory, 1).state["frozen"]
    assert finished["exported"] == result.step == finished["best"]["step"]
    exported = dict(load_model(result.policy).named_parameters())
    for name in start:
        assert torch.equal(exported[name], saved(directory, result.step).full(name))
    assert (directory.evaluation / "ppo_reward_kl.json").exists()
    assert (directory.samples / "validation_00000006.jsonl").exists()


def test_an_interrupted_round_is_one_that_was_not(play):
    _, whole = play("whole")

    class Killed(Exception):
        pass

    def kill_at(step):
        def after(number, _):
            if number == step:
                raise Killed

        return after

    for step in (1, 2, 4, 5):  # before the first checkpoint, in the warm-up, after it, on a validated iteration's heels
        with pytest.raises(Killed):
            play("parts", after_iteration=kill_at(step))
    _, parts = play("parts")
    assert parts.metrics.read_bytes() == whole.metrics.read_bytes()
    for name in saved(whole, 6).shapes:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(saved(parts, 6).full(name, kind), saved(whole, 6).full(name, kind)), name
    with pytest.raises(ConfigError, match="another reference model"):
        play("parts", "ppo.iterations=5", reference=whole.checkpoints / "step_00000006")


@pytest.mark.parametrize(
    "overrides", [["ppo.micro_batch_tokens=20", "train.micro_batch=1"], ["ppo.micro_batch_tokens=9999"]]
)
def test_any_split_into_micro_batches_learns_the_same(play, overrides):
    settings = [
        "ppo.iterations=1",
        "ppo.critic_warmup=0",
        "ppo.pretrain.share=3",
        "train.micro_batch=4",
        "train.batch_tokens=256",
    ]
    _, one = play("one", *settings)
    _, other = play("other", *settings, *overrides)
    first, second = records(one)[-1], records(other)[-1]
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    assert second["critic_grad_norm"] == pytest.approx(first["critic_grad_norm"], rel=1e-4)
    for name in saved(one, 1).shapes:
        torch.testing.assert_close(
            saved(one, 1).full(name, "exp_avg"), saved(other, 1).full(name, "exp_avg"), rtol=1e-3, atol=1e-6
        )


def test_no_pad_id_is_ever_read(play, monkeypatch):
    from internlm2.text.huggingface_tokenizer import HuggingFaceTokenizer

    settings = ["ppo.iterations=1", "ppo.critic_warmup=1"]
    _, before = play("before", *settings)

    def refuse(self):
        raise AssertionError("a mask was made from a pad id")

    monkeypatch.setattr(HuggingFaceTokenizer, "pad_id", property(refuse, lambda self, value: None), raising=False)
    _, after = play("after", *settings)
    assert after.metrics.read_bytes() == before.metrics.read_bytes()


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory, policy) -> Path:
    """A random conditional reward model as an export."""
    folder = tmp_path_factory.mktemp("reward") / "export"
    config = composed("init_from=null", "data.tokenizer.kind=toy")
    model = ScalarModel.from_config(config.model, seed=8)
    export_weights(model_weights(model), folder, tokenizer=policy)
    conditions = {domain: f"judge {domain}" for domain in ("helpful", "harmless", "brief")}
    (folder / "reward.json").write_text(json.dumps({"conditions": conditions}))
    return folder


def test_the_condition_reaches_the_reward_model_alone(play, policy, reward_model, monkeypatch):
    tokenizer = load_tokenizer(policy)
    opening = [tokenizer.special_id("<|im_start|>"), *tokenizer.encode("system\njudge")]
    judged, others, inside = [], [], []
    forward, generate, score = InternLM2.forward, Engine.generate, RewardScorer._forward

    def listen(self, ids, *rest):
        (judged if inside else others).append(ids.tolist())
        return forward(self, ids, *rest)

    def listen_to_prompts(self, prompts, *rest, **named):
        others.extend(list(prompt) for prompt in prompts)
        return generate(self, prompts, *rest, **named)

    def listen_to_judge(self, rows):
        inside.append(True)
        try:
            return score(self, rows)
        finally:
            inside.pop()

    monkeypatch.setattr(InternLM2, "forward", listen)
    monkeypatch.setattr(Engine, "generate", listen_to_prompts)
    monkeypatch.setattr(RewardScorer, "_forward", listen_to_judge)
    settings = ["ppo.reward.kind=model", "ppo.critic.init=reward", "ppo.iterations=1", "ppo.critic_warmup=1"]
    _, directory = play("conditions", *settings, reward=reward_model)
    asked = [line["answers"] for line in records(directory)[1:]] + [records(directory)[0]["held_out"]["all"]["answers"]]
    assert (
        sum(times(opening, ids) for ids in judged) == sum(asked) + records(directory)[-1]["held_out"]["all"]["answers"]
    )
    assert len(others) > len(judged)  # policy, reference, critic and the sampler have read the same questions
    assert sum(times(opening, ids) for ids in others) == 0
    finished = json.loads((directory.path / "finished.json").read_text())
    assert set(finished["frozen"]) == {"reference", "reward"}


def times(needle, ids):
    return sum(ids[at : at + len(needle)] == needle for at in range(len(ids)))


def test_the_critic_starts_as_the_reward_model_with_a_new_head(policy, reward_model):
    settings = [f"init_from={policy}", "ppo.reward.kind=model", "ppo.critic.init=reward"]
    size = load_tokenizer(policy).vocab_size
    models = build_models(composed(*settings), policy=policy, reference=policy, reward=reward_model, vocab_size=size)
    judge = load_scalar_model(reward_model)
    theirs = dict(judge.named_parameters())
    for name, tensor in models.critic.model.named_parameters():
        assert torch.equal(tensor, theirs[name]) == (name != "v_head.weight"), name
    # With the policy as its beginning it is another network.
    models = build_models(
        composed(*settings[:2], "ppo.critic.init=policy"),
        policy=policy,
        reference=policy,
        reward=reward_model,
        vocab_size=size,
    )
    start = dict(load_model(policy).named_parameters())
    for name, tensor in models.critic.model.model.named_parameters():
        assert torch.equal(tensor, start[f"model.{name}"])


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_estimators_without_a_critic_load_none(play, estimator):
    settings = [f"ppo.estimator={estimator}", "ppo.critic_warmup=0", "ppo.samples_per_prompt=4", "ppo.iterations=2"]
    settings += ["ppo.prompts_per_iteration=3", "ppo.kl.place=loss", "ppo.kl.estimator=k2"]
    _, directory = play("group", *settings)
    last = records(directory)[-1]
    assert not any(name.startswith("critic.") for name in saved(directory, 2).shapes)
    assert "value_loss" not in last
    assert last["answers"] == 12
    assert last["grad_norm"] > 0


def test_several_minibatches_and_epochs_move_the_ratio(play):
    settings = ["ppo.epochs=2", "ppo.minibatches=2", "ppo.iterations=1", "ppo.critic_warmup=0", "optim.lr=0.01"]
    _, directory = play("passes", *settings, "optim.warmup_ratio=0", "ppo.whiten=true")
    last = records(directory)[-1]
    assert last["first_ratio_distance"] < 1e-5
    assert last["ratio_distance"] > 1e-3
    assert last["kl_old"] > 0
    assert saved(directory, 1).state["engine"]["engines"][""]["step"] == 4


def test_adapters_share_the_reference_and_export_merged_weights(play, policy):
    settings = ["adapter=lora", "adapter.rank=4", "ppo.critic_warmup=1", "ppo.iterations=2", "optim.lr=0.01"]
    result, directory = play("lora", *settings)
    lines = records(directory)
    assert abs(lines[1]["kl"]) < 1e-5
    assert abs(lines[-1]["kl"]) > 1e-4
    assert all(line["drift"]["kl"] < 1e-7 for line in lines[1:])  # the sampler has the merged weights
    names = saved(directory, 3).shapes
    assert all(".lora_" in name or name == "critic.v_head.weight" for name in names)
    start, end = (dict(load_model(folder).named_parameters()) for folder in (policy, result.policy))
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed
    assert all(name.rpartition(".")[0].endswith(("wqkv", "wo", "w1", "w2", "w3")) for name in changed)
    assert (directory.path / "adapter" / "adapter_model.safetensors").exists()


def test_quantized_rollouts_are_corrected(play):
    _, directory = play("w8", "generation.quantize=w8", "ppo.correction.weights=truncated", "frozen.quantize=w8")
    last = records(directory)[-1]
    assert 1e-9 < last["drift"]["kl"] < 0.05
    assert last["importance_weight"] == pytest.approx(1.0, abs=0.1)


def test_a_sampler_that_is_not_the_policy_stops_the_run(play, monkeypatch):
    generate = Engine.generate

    def wrong(self, *rest, **named):
        drawn = generate(self, *rest, **named)
        for answer in drawn:
            answer.logprobs = [value - 2.0 for value in answer.logprobs]
        return drawn

    monkeypatch.setattr(Engine, "generate", wrong)
    with pytest.raises(TrainingStopped, match="stop_above"):
        play("stale")


def test_rules(policy):
    from internlm2.data.prompts import Prompt
    from internlm2.text.chat import Message

    def sample(text, answer):
        prompt = Prompt((Message("user", "?"),), "math", {"answer": answer})
        return Sample(prompt, text, [1], "stop", Message("assistant", text))

    rule = RuleReward("final_number")
    assert rule([sample("it is 12", "12"), sample("it is 13", "12"), sample("", "x\n#### 12"), sample("12.0", 12)]) == [
        1,
        0,
        0,
        1,
    ]
    with pytest.raises(ConfigError, match=r"ppo\.reward\.rule=nothing"):
        RuleReward("nothing")
    with pytest.raises(ConfigError, match="no field `answer`"):
        rule([Sample(Prompt((Message("user", "?"),), "math"), "1", [1], "stop", Message("assistant", "1"))])
