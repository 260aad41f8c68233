"""The plan of stage=ppo: from its config to phases, memory and days, as text."""

from dataclasses import dataclass, replace
from math import ceil

from internlm2.config import Config
from internlm2.config.ppo import PPOConfig
from internlm2.plan.coefficients import fitted
from internlm2.plan.hardware import Hardware
from internlm2.plan.layout import OURS
from internlm2.plan.network import Network
from internlm2.plan.ppo import PPOPlan, PPOPlanner, PPOWork
from internlm2.plan.speed import SpeedModel
from internlm2.plan.table import GIB, engine_name, parts_table, row
from internlm2.plan.work import buffers, engine_layout

BITS = {"none": 16, "w8": 8, "w4": 4}


@dataclass(frozen=True)
class PPOStagePlan:
    """One round of PPO on `gpus` GPUs: as configured where that can run, and the best setting, where any fits."""

    work: PPOWork
    hardware: Hardware
    gpus: int
    configured: PPOPlan | None
    reason: str
    best: PPOPlan | None

    @property
    def factor(self) -> float:
        """What an iteration takes beyond its phases, by the published runs."""
        return fitted().ppo_factor

    def iteration_seconds(self, plan: PPOPlan) -> float:
        return self.factor * plan.seconds

    def days(self, plan: PPOPlan) -> float:
        """All iterations of the round."""
        return self.iteration_seconds(plan) * self.work.iterations / 86_400


def work_of(config: Config, ppo: PPOConfig) -> PPOWork:
    """One iteration with every prompt and answer at its limit: an upper bound of time and memory."""
    network, rollout = Network.of(config.model), ppo.rollout
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    has_reward = ppo.reward.kind == "model"
    return PPOWork(
        actor=network,
        critic=network,
        samples=ppo.rows,
        prompt_tokens=rollout.max_prompt_tokens,
        answer_tokens=rollout.max_new_tokens,
        iterations=ppo.iterations + ppo.critic_warmup,
        pretrain_tokens=round(ppo.pretrain.share * ppo.rows * length) if ppo.pretrain.coefficient > 0 else 0,
        epochs=ppo.epochs,
        weight_bits=BITS[config.generation.quantize],
        has_critic=ppo.has_critic,
        has_reward=has_reward,
    )


def plan_ppo(config: Config) -> PPOStagePlan:
    """The plan of stage=ppo on `cluster`."""
    if config.ppo is None:
        raise ValueError("stage.kind=ppo without the group ppo")
    work, hardware, gpus = work_of(config, config.ppo), Hardware.of(config.cluster), config.cluster.gpus
    sizes = buffers(config)
    speed = SpeedModel(fitted().coefficients, hardware, replace(OURS, reduce_bytes=sizes.reduce_bytes))
    planner = PPOPlanner(work, hardware, speed, sizes)
    micro_batch = max(1, config.ppo.micro_batch_tokens // work.length)
    layout, reason = engine_layout(config, ceil(work.samples / gpus) * gpus, work.length, micro_batch)
    planned = None if layout is None else planner.plan(layout)
    if layout is not None and planned is None:
        reason = "its memory does not fit"
    return PPOStagePlan(work, hardware, gpus, planned, reason, planner.best(gpus))


def ppo_lines(plan: PPOStagePlan) -> list[str]:
    """The plan as text."""
    work, hardware = plan.work, plan.hardware
    lines = [
        f"ppo: {work.actor.name}, {work.samples:,} answers an iteration, prompts of {work.prompt_tokens:,} and answers "
        f"of {work.answer_tokens:,} tokens at most, on {plan.gpus} x {hardware.name}",
        "",
    ]
    if plan.configured is None:
        lines.append(f"  as configured it cannot run: {plan.reason}")
    if plan.best is None:
        return [*lines, f"  no setting fits {plan.gpus} GPUs", ""]
    shown = {"proposed": plan.best} if plan.configured is None else {"configured": plan.configured}
    if plan.configured is not None and plan.configured.layout != plan.best.layout:
        shown["proposed"] = plan.best
    return [*lines, *_table(plan, shown), ""]


def _table(plan: PPOStagePlan, shown: dict[str, PPOPlan]) -> list[str]:
    plans = list(shown.values())
    iterations = [plan.iteration_seconds(one) for one in plans]
    phases = [{name: plan.factor * seconds for name, seconds in one.phases.items()} for one in plans]
    tokens = plan.work.samples * plan.work.answer_tokens
    return [
        row("", shown),
        row("engine", [engine_name(one.layout) for one in plans]),
        row("recompute", [one.layout.recompute for one in plans]),
        row("micro-batch x passes", [f"{one.layout.micro_batch} x {one.layout.accumulation}" for one in plans]),
        row("rows generated together", [f"{one.rows_at_once:,} a GPU" for one in plans]),
        "",
        "  memory of one GPU while it generates, GiB",
        *parts_table([one.generating.parts for one in plans], GIB),
        "",
        "  memory of one GPU while it trains, GiB",
        *parts_table([one.training.parts for one in plans], GIB),
        "",
        "  time of one iteration, s",
        *parts_table(phases, 1.0),
        "",
        row("generated tokens/s/GPU", [f"{tokens / one['generation'] / plan.gpus:,.0f}" for one in phases]),
        row("days", [f"{seconds * plan.work.iterations / 86_400:,.2f}" for seconds in iterations]),
        row("GPU-hours", [f"{seconds * plan.work.iterations / 3600 * plan.gpus:,.0f}" for seconds in iterations]),
        row("what takes most", [max(one, key=lambda name: one[name]) for one in phases]),
    ]
