"""Online RLHF with PPO (report 4.2.3): from the SFT policy and the reward model to a policy that is rated higher.

CPU         python train.py stage=ppo model=tiny preset=demo
real model  python train.py stage=ppo model=smollm2_135m preset=demo init_from=smollm2 adapter=lora name=smollm2
one GPU     python train.py stage=ppo model=1_8b data=my_corpus prompts=my_prompts init_from=sft
"""

from pathlib import Path

from rich.console import Console

from internlm2.config import Config, ConfigError
from internlm2.config.start import initial_weights
from internlm2.run.directory import RunDirectory
from internlm2.stages.ppo_models import check_machine
from internlm2.stages.ppo_round import run_round


def run(config: Config, directory: RunDirectory, console: Console) -> int:
    """One round: build, resume, train, finish. Returns the exit code: 0, or 128 + the signal that stopped it."""
    check_machine(config)
    policy = initial_weights(config)
    if policy is None:
        raise ConfigError("stage=ppo starts from a policy: set init_from to an SFT run, an export, or smollm2.")
    return run_round(config, directory, console, policy=policy, reward=reward_model(config)).code


def reward_model(config: Config) -> Path | None:
    """Where the reward model of ppo.reward lies; None for a rule."""
    assert config.ppo is not None
    reward = config.ppo.reward
    if reward.kind == "rule":
        return None
    candidates = [Path(config.root) / config.name / str(reward.model), Path(str(reward.model))]
    for path in candidates:
        if path.exists():
            return path
    raise ConfigError(
        f"ppo.reward.model={reward.model}: neither {candidates[0]} nor {candidates[1]} exists. Run stage=rm with "
        f"name={config.name} first, give a reward model's folder, or use ppo.reward.kind=rule."
    )
