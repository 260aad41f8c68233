"""Published times of whole PPO runs, which the PPO plan is scaled to and judged by.

`published_ppo.csv`: DeepSpeed-Chat, step 3 (microsoft/DeepSpeed, blogs/deepspeed-chat/README.md, tables 1 and 2): hours
for 135M tokens in batches of 1,024 pairs of 256 + 256 tokens, OPT actors, critic and reward model of 350M parameters.
The tables do not give network, engine or micro-batches: 8 x 200 Gb/s a node, and the best setting that fits.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from internlm2.plan.coefficients import Coefficients
from internlm2.plan.hardware import Hardware
from internlm2.plan.layout import Practice
from internlm2.plan.memory import Buffers
from internlm2.plan.network import Network
from internlm2.plan.ppo import PPOPlanner, PPOWork
from internlm2.plan.published import Errors, hardware_of, quantile
from internlm2.plan.speed import SpeedModel

TABLE = Path(__file__).with_name("published_ppo.csv")
PAIRS, PROMPT, ANSWER = 1024, 256, 256
ITERATIONS = round(135e6 / (PAIRS * (PROMPT + ANSWER)))
NODE_GBPS = 200.0
# Attention that writes its scores to memory: about ten passes over [heads, 512] a token beside 24 over the hidden size.
EAGER = Practice(elementwise=3.5)


def _opt(name: str, hidden: int, layers: int, heads: int) -> Network:
    return Network(name, hidden, layers, heads, heads, hidden // heads, 4 * hidden, 50_272, gated=False, tied=True)


ACTORS = {
    network.name: network
    for network in (
        _opt("opt-6.7b", 4096, 32, 32),
        _opt("opt-13b", 5120, 40, 40),
        _opt("opt-30b", 7168, 48, 56),
        _opt("opt-66b", 9216, 64, 72),
        _opt("opt-175b", 12288, 96, 96),
    )
}
CRITIC = _opt("opt-350m", 1024, 24, 16)


@dataclass(frozen=True)
class PublishedPPO:
    """One run: who, where, and its hours."""

    actor: Network
    hardware: Hardware
    gpus: int
    hours: float

    def predicted(self, coefficients: Coefficients) -> float | None:
        """Hours by the model, without its factor for PPO; None where nothing fits."""
        work = PPOWork(self.actor, CRITIC, PAIRS, PROMPT, ANSWER, ITERATIONS)
        speed = SpeedModel(coefficients, self.hardware, EAGER)
        plan = PPOPlanner(work, self.hardware, speed, Buffers(), may_split=True).best(self.gpus)
        return None if plan is None else plan.seconds * ITERATIONS / 3600


def read_ppo_runs(path: Path = TABLE) -> list[PublishedPPO]:
    with open(path, newline="", encoding="utf-8") as file:
        return [
            PublishedPPO(
                ACTORS[row["actor"]], hardware_of(row["gpu"], NODE_GBPS), int(row["gpus"]), float(row["hours"])
            )
            for row in csv.DictReader(file)
        ]


def judge_ppo(coefficients: Coefficients) -> tuple[float, Errors]:
    """The factor that brings the model to the published hours (their median ratio), and the errors of each run under
    the factor of the others.
    """
    ratios = []
    for run in read_ppo_runs():
        predicted = run.predicted(coefficients)
        if predicted is None:
            raise ValueError(
                f"No setting fits {run.actor.name} on {run.gpus} GPUs, which was run: the memory model is off."
            )
        ratios.append(run.hours / predicted)
    logs = [median(ratios[:i] + ratios[i + 1 :]) / ratio - 1 for i, ratio in enumerate(ratios)]
    sizes = sorted(abs(value) for value in logs)
    errors = Errors(len(ratios), quantile(sizes, 0.5), quantile(sizes, 0.9), sizes[-1], quantile(sorted(logs), 0.5))
    return median(ratios), errors
