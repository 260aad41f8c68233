"""What `plan=true` prints."""

import sys
from collections.abc import Sequence
from typing import TextIO

from internlm2.config import Config
from internlm2.plan.coefficients import fitted
from internlm2.plan.plan import StagePlan, plan_stage
from internlm2.plan.ppo_stage import plan_ppo, ppo_lines
from internlm2.plan.search import Candidate
from internlm2.plan.table import GIB, engine_name, parts_table, row


def print_plans(configs: Sequence[Config], out: TextIO | None = None) -> None:
    """The plan of each stage, one after another; starts nothing."""
    stream = sys.stdout if out is None else out
    for config in configs:
        lines = ppo_lines(plan_ppo(config)) if config.stage.kind == "ppo" else stage_lines(plan_stage(config))
        print("\n".join(lines), file=stream)
    print("\n".join(error_band(configs[0].cluster.time_factor, [config.stage.kind for config in configs])), file=stream)


def stage_lines(plan: StagePlan) -> list[str]:
    """A stage's plan as text."""
    work, hardware = plan.work, plan.hardware
    nodes = -(-plan.gpus // hardware.gpus_per_node)
    lines = [
        f"{plan.stage}: {work.network.name}, {work.network.parameters / 1e9:.2f}B parameters, {work.rows:,} rows of "
        f"{work.seq_len:,} tokens a step, on {plan.gpus} x {hardware.name} ({nodes} node{'s' if nodes > 1 else ''})",
        "",
    ]
    if plan.configured is None:
        lines.append(f"  as configured it cannot run: {plan.reason}")
    elif not plan.configured.fits(hardware):
        needs, has = plan.configured.memory.total / GIB, hardware.memory_bytes / GIB
        lines.append(f"  as configured it does not fit: {needs:.1f} GiB on GPUs with {has:.1f} GiB")
    if plan.best is None:
        more = f"; {plan.smallest} would do" if plan.smallest else ""
        return [*lines, f"  no setting fits {plan.gpus} GPUs{more}", ""]
    shown: dict[str, Candidate] = {}
    if plan.configured is not None:
        shown["configured"] = plan.configured
    if plan.configured is None or plan.best.layout != plan.configured.layout:
        shown["proposed"] = plan.best
    lines += table(plan, shown)
    if "proposed" in shown:
        keys = " ".join(plan.best.overrides(hardware.gpus_per_node))
        lines += ["", f"  to get the proposed setting: {keys}"]
    return [*lines, ""]


def table(plan: StagePlan, shown: dict[str, Candidate]) -> list[str]:
    """Settings side by side."""
    candidates = list(shown.values())
    lines = [row("", shown)]
    for title, values in (
        ("engine", [engine_name(candidate.layout) for candidate in candidates]),
        ("sequence parallel", [str(candidate.layout.sequence) for candidate in candidates]),
        ("recompute", [candidate.layout.recompute for candidate in candidates]),
        (
            "micro-batch x passes",
            [f"{candidate.layout.micro_batch} x {candidate.layout.accumulation}" for candidate in candidates],
        ),
    ):
        lines.append(row(title, values))
    lines += ["", "  memory of one GPU at its peak, GiB"]
    lines += parts_table([candidate.memory.parts for candidate in candidates], GIB)
    lines += ["", "  time of one step, s"]
    lines += parts_table([candidate.time.parts for candidate in candidates], 1.0, digits=3)
    lines += ["", "  sent in one step, GB"]
    for place in ("link", "network"):
        title = "one GPU's link" if place == "link" else "one node's network"
        lines += parts_table([getattr(candidate.traffic, place) for candidate in candidates], 1e9, f"{title}: ")
    lines.append("")
    rates = [plan.tokens_per_second(candidate) for candidate in candidates]
    lines.append(row("tokens/s/GPU", [f"{rate:,.0f}" for rate in rates]))
    lines.append(row("MFU", [f"{plan.mfu(candidate):.1%}" for candidate in candidates]))
    days = [plan.days(candidate) for candidate in candidates]
    if None not in days:
        lines.append(row("days", [f"{value:,.2f}" for value in days]))
        lines.append(row("GPU-hours", [f"{24 * (value or 0) * plan.gpus:,.0f}" for value in days]))
    else:
        lines.append("  days: the stage's length follows from its data; give train.tokens or train.steps")
    lines.append(row("what takes most", [candidate.time.bound for candidate in candidates]))
    lines.append(row("what binds", [binding(plan, candidate) for candidate in candidates]))
    return lines


def binding(plan: StagePlan, candidate: Candidate) -> str:
    """Which resource the setting is limited by."""
    if not candidate.fits(plan.hardware):
        return "memory: too little"
    if candidate.layout.offload:
        return "memory: states on the host"
    if candidate.layout.recompute != "none":
        return "memory: activations recomputed"
    time = candidate.time.parts
    if time.get("exposed traffic", 0.0) > 0.15 * candidate.time.total:
        return "network" if plan.gpus > plan.hardware.gpus_per_node else "links"
    if candidate.time.bound in ("elementwise", "loss", "optimizer"):
        return "memory bandwidth"
    return "arithmetic"


def error_band(time_factor: float, kinds: Sequence[str]) -> list[str]:
    """How far off such plans were on runs that the fit had not seen."""
    found = fitted().errors
    halves, calibrated = found["held_out_halves"], found["calibrated"]
    sources = ", ".join(
        f"{one['median']:.0%} for {name}" for name, one in found["left_out"].items() if name in calibrated
    )
    lines = [
        "how sure: on published runs held out from the fit, tokens/s were off by "
        f"{halves['median']:.1%} in the median and {halves['p90']:.1%} at the 90th percentile; with all runs of one "
        f"source held out by {sources} in the median. Expect the latter on a new cluster or framework.",
        "Every row is taken as one full sequence, and no failure or straggler is in it. Memory counts tensors exactly; "
        "context and fragmentation are assumed.",
    ]
    if "ppo" in kinds:
        ppo = found["ppo"]
        lines.append(
            f"PPO's times carry a factor of {fitted().ppo_factor:.2f} that the published DeepSpeed-Chat runs ask for; "
            f"each of the {ppo['rows']} was off by {ppo['median']:.0%} in the median and {ppo['p90']:.0%} at the 90th "
            "percentile under the factor of the others."
        )
    if time_factor != 1.0:
        lines.append(f"Times carry cluster.time_factor={time_factor:g} from a measured run.")
    else:
        lines.append("One measured run narrows it: python -m internlm2.plan.calibrate RUN")
    return lines
