"""The arithmetic that refuses a PPO run before anything is loaded."""

import pytest

from internlm2.config import ConfigError
from internlm2.config.ppo_memory import check_memory, ppo_memory
from tests.config.test_ppo import composed

GIB = 2**30


def by_name(*overrides, ranks=1):
    return {model.name: model for model in ppo_memory(composed(*overrides), ranks)}


def test_bytes_a_parameter():
    config = composed("model=20b")
    total = config.model.parameters()["total"]
    models = by_name("model=20b")
    assert models["actor"].total == 18 * total  # bf16 2 + masters 4 + moments 8 + gradients 4
    assert by_name("model=20b", "engine.dtype=fp32")["actor"].total == 16 * total
    head = config.model.vocab_size * config.model.hidden_size
    assert models["critic"].parameters == total - head
    assert models["reference"].total == 2 * total
    assert by_name("model=20b", "frozen.quantize=w8")["reward model"].total == total - head


def test_adapters_and_estimators_save_models():
    whole, lora = by_name("model=7b"), by_name("model=7b", "adapter=lora")
    assert "reference" in whole
    assert "reference" not in lora
    assert lora["actor"].total < whole["actor"].total / 6
    grpo = by_name("model=7b", "ppo.estimator=grpo", "ppo.samples_per_prompt=4", "ppo.critic_warmup=0")
    assert "critic" not in grpo


def test_adapter_parameters_are_those_of_the_model():
    from internlm2.model.adapters import adapter_parameters, add_adapters
    from internlm2.model.transformer import CausalLM

    config = composed("model=tiny", "adapter=lora", "adapter.rank=8", "engine.dtype=fp32")
    model = add_adapters(CausalLM.from_config(config.model, device="meta"), config.adapter, 0)
    trained = sum(parameter.numel() for _, parameter in adapter_parameters(model))
    actor = next(m for m in ppo_memory(config) if m.name == "actor")
    assert actor.moments == 8 * trained


def test_zero_divides_among_ranks():
    one, eight = (by_name("model=20b", "engine=zero3", ranks=ranks)["actor"].total for ranks in (1, 8))
    assert eight == one / 8
    spread = by_name("model=20b", "engine=zero3", "frozen.shard=true", ranks=8)["reference"].total
    assert spread == by_name("model=20b", "engine=zero3", "frozen.shard=false", ranks=8)["reference"].total / 8


def test_the_refusal_names_every_model_and_what_to_do():
    config = composed("model=20b")
    with pytest.raises(ConfigError) as error:
        check_memory(config, 23 * GIB, "this machine")
    for word in (
        "766",
        "23.0 GiB",
        "actor 332.9",
        "masters 74.0",
        "critic",
        "reference",
        "reward model",
        "zero3",
        "lora",
    ):
        assert word in str(error.value)
    assert len(check_memory(config, 2000 * GIB, "a large machine")) == 5
