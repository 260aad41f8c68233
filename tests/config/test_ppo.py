"""stage=ppo composes with the report's values, and refuses what cannot work before torch is imported."""

import pytest
from hydra import compose, initialize_config_dir

from internlm2.config import ConfigError
from internlm2.config.compose import CONF, known_keys, register_schema, to_config


def composed(*overrides):
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("train", overrides=["stage=ppo", *overrides]))


@pytest.mark.parametrize("model", ["1_8b", "7b", "20b"])
def test_the_values_of_the_report(model):
    config = composed(f"model={model}", "init_from=/somewhere")
    ppo = config.ppo
    assert (ppo.critic_warmup, ppo.iterations, ppo.gae_lambda) == (50, 400, 0.99)
    assert 400 * ppo.prompts_per_iteration == pytest.approx(200_000, rel=0.05)
    assert (config.optim.lr, ppo.critic.optim.lr) == (1e-6, 5e-6)
    assert (ppo.kl.coefficient, ppo.kl.place, ppo.kl.estimator) == (0.01, "reward", "k1")
    assert (ppo.pretrain.coefficient, ppo.pretrain.share) == (0.5, 0.5)
    assert ppo.rollout.top_p == 0.9
    assert ppo.value_clip is None
    assert ppo.whiten is False
    assert (ppo.critic.init, ppo.reward.kind, ppo.validation.select) == ("reward", "model", "best")
    assert config.train.total_steps == ppo.iterations


RULE = ["ppo.reward.kind=rule", "ppo.reward.rule=final_number", "ppo.critic.init=policy"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ppo.kl.estimator=k3"], "only k1"),
        (["ppo.kl.estimator=k2"], "only k1"),
        (["ppo.kl.place=loss"], "gradient of zero"),
        (["ppo.kl.place=loss", "ppo.kl.estimator=k3"], "KL\\(reference"),
        (["ppo.estimator=grpo"], "samples_per_prompt"),
        (["ppo.estimator=rloo", "ppo.samples_per_prompt=4"], "critic_warmup=0"),
        (["ppo.reward.kind=rule"], "ppo.reward.rule"),
        (RULE[:2], "ppo.critic.init=reward"),
        (["ppo.reward.model=null"], "ppo.reward.model"),
        (["generation.quantize=w8"], "correction.weights=truncated"),
        (["ppo.rollout.max_new_tokens=5000"], "max_new_tokens=3072"),
        (["engine.on_nonfinite=rollback"], "skip or stop"),
        (["adapter=lora", "adapter.dropout=0.1"], "adapter.dropout=0"),
        (["ppo.old_logprobs=sampler", "ppo.rollout.temperature=0.7"], "recomputed"),
        (["ppo.correction.weights=truncated", "ppo.rollout.temperature=0.7"], "sampler=truncated"),
        (["ppo.rollout.engine=vllm", "ppo.correction.sampler=truncated"], "sampler=full"),
        (["ppo.minibatches=1000"], "512 answers"),
        (["ppo.reward.length_buffer=2000"], "length_buffer"),
        (["ppo.gae_lambda=1.5"], "at most 1"),
        (["ppo.critic.optim.beta1=1.0"], "ppo.critic.optim.beta1"),
        (["prompts=my_prompts", "prompts.sources.safety.path=null"], "prompts.sources.safety"),
        (["~data.weights.ppo"], "data.weights.ppo"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(overrides, words):
    with pytest.raises(ConfigError, match=words):
        composed("model.max_position_embeddings=4096", *overrides)


def test_what_does_work():
    config = composed(
        *RULE, "ppo.kl.place=loss", "ppo.kl.estimator=k2", "ppo.pretrain.coefficient=0", "~data.weights.ppo"
    )
    assert config.ppo.kl.place == "loss"
    grpo = composed("ppo.estimator=grpo", "ppo.samples_per_prompt=4", "ppo.critic_warmup=0", *RULE[:2])
    assert not grpo.ppo.has_critic
    assert grpo.ppo.rows == 2048


def test_an_unknown_key_is_answered_with_the_nearest():
    assert "ppo.kl.coefficient" in known_keys()


def test_other_stages_have_no_ppo():
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_config(compose("train", overrides=["stage=pretrain_4k"]))
    assert config.ppo is None
    assert config.prompts is None
