"""Online RLHF with PPO in rounds (report 4.2.2, 4.2.3): from the SFT policy and the reward model to a policy that is
rated higher, with the reward model trained again between rounds on what the policy found out about it.

CPU         python train.py stage=ppo model=tiny preset=demo
real model  python train.py stage=ppo model=smollm2_135m preset=demo init_from=smollm2 adapter=lora name=smollm2
one GPU     python train.py stage=ppo model=1_8b data=my_corpus prompts=my_prompts init_from=sft
"""

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from internlm2.config import Config, ConfigError
from internlm2.config.start import initial_weights
from internlm2.rlhf.answers import write_lines
from internlm2.run.directory import RunDirectory
from internlm2.run.provenance import record_end, record_start
from internlm2.stages.ppo_models import check_machine
from internlm2.stages.ppo_round import run_round
from internlm2.stages.round_figures import figures, round_line
from internlm2.stages.round_models import RoundModels
from internlm2.stages.round_work import Start, Stopped
from internlm2.stages.rounds import run_rounds

log = logging.getLogger(__name__)


def run(config: Config, directory: RunDirectory, console: Console) -> int:
    """Rounds: build, resume, run, finish. Returns the exit code: 0, or 128 + the signal that stopped it.

    A rule needs no training between rounds: with ppo.reward.kind=rule there is one round, in `directory` itself.
    """
    assert config.rounds is not None
    check_machine(config)
    policy, reward = initial_weights(config), reward_model(config)
    if policy is None:
        raise ConfigError("stage=ppo starts from a policy: set init_from to an SFT run, an export, or smollm2.")
    if reward is None:
        return run_round(config, directory, console, policy=policy).code
    models = RoundModels(config, console, policy, reward)
    config.rounds.audit.enabled = models.has_audit()
    record_start(directory, step=0, config=OmegaConf.to_yaml(OmegaConf.structured(config)))
    try:
        rounds = run_rounds(directory.path, Start(policy, reward, config.seed), config.rounds, models.work())
    except Stopped as stopped:
        if str(stopped):
            log.warning("%s", stopped)
        record_end(directory, step=None, status="stopped")
        return stopped.code
    if directory.writes:
        finish(config, directory, rounds)
    return 0


def finish(config: Config, directory: RunDirectory, rounds: list[dict[str, Any]]) -> None:
    """One record a round, the figures of the report, export/ of the last round, and the mark that all is done."""
    assert config.ppo is not None
    write_lines(directory.metrics, ({"step": one["round"], **one["fixed"]["late"]} for one in rounds))
    for name, figure in figures(rounds, directory.path).items():
        directory.write_json(f"evaluation/{name}.json", figure)
    directory.write_json("data.json", [round_line(one) for one in rounds])
    last = f"round_{rounds[-1]['round']}"
    if config.checkpoint.export:
        directory.export.unlink(missing_ok=True)  # of a run with fewer rounds
        directory.export.symlink_to(Path(last) / "policy" / "export", target_is_directory=True)
    done = {"rounds": len(rounds), "step": config.ppo.iterations, "epochs": None}
    directory.write_json("finished.json", done)
    record_end(directory, step=len(rounds), status="finished")


def describe_rounds(directory: Path) -> list[str]:
    """One line for each round: what it began and ended with on held-out prompts, and what it found."""
    lines = []
    for one in finished_rounds(directory):
        start, end = one["fixed"]["sft"], one["fixed"]["late"]
        parts = [f"score {start['score']:.2f} -> {end['score']:.2f}"]
        if "gold" in end:
            parts.append(f"gold {start['gold']:.2f} -> {end['gold']:.2f}")
        parts.append(f"{one['fast_pairs']} pairs against hacks, {one['comparisons']} comparisons asked for")
        if one["audit"]:
            parts.append("the audit model raises the alarm" if one["audit"]["alarm"] else "no alarm")
        lines.append(f"{directory.name + ' round ' + str(one['round']):14}{'   '.join(parts)}")
    return lines


def finished_rounds(directory: Path) -> list[dict[str, Any]]:
    """What the round.json of each finished round says, in order."""
    files = sorted(directory.glob("round_*/round.json"), key=lambda file: int(file.parent.name.removeprefix("round_")))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


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
