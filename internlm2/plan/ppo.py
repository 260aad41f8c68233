"""PPO: generation, scoring and training of one iteration, with four models on every GPU (report 4.2.3).

Generation reads all weights and the cache of keys and values for every token: memory bandwidth bounds it. Scoring and
training are forward and backward passes, timed as any other.
"""

from dataclasses import dataclass, replace
from math import ceil

from internlm2.plan.hardware import Hardware
from internlm2.plan.layout import Layout
from internlm2.plan.memory import Buffers, Memory, activations, layer_peak, loss_peak, model_states, with_reserve
from internlm2.plan.network import Network
from internlm2.plan.speed import BF16, SpeedModel, StepTime

STREAM = (
    0.6  # share of the memory bandwidth that decoding reaches; see benchmarks of the published DeepSpeed-Chat times
)
DECODE_LAUNCH = 60e-6  # seconds a layer and token: kernels too small to fill the GPU
EXCHANGE = 30e-6  # seconds of a small all-reduce inside a node, where a model is split for generation


@dataclass(frozen=True)
class PPOWork:
    """One iteration: `samples` prompts are answered, scored, and trained on `epochs` times.

    Actor and reference have the shape `actor`; critic and reward model that of `critic`. Lengths are averages, in
    tokens. `pretrain_tokens` of pre-training text join the actor's batch. `weight_bits` of the generating copy.
    """

    actor: Network
    critic: Network
    samples: int
    prompt_tokens: int
    answer_tokens: int
    iterations: int
    pretrain_tokens: int = 0
    epochs: int = 1
    weight_bits: int = 16
    has_critic: bool = True
    has_reward: bool = True

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    @property
    def tokens(self) -> int:
        """Tokens of all samples of an iteration."""
        return self.samples * self.length


@dataclass(frozen=True)
class PPOPlan:
    """Seconds of each phase of one iteration, and memory at the peak of generation and of training."""

    layout: Layout
    phases: dict[str, float]
    generating: Memory
    training: Memory
    rows_at_once: int
    split: int

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def peak(self) -> Memory:
        return max(self.generating, self.training, key=lambda memory: memory.total)


class PPOPlanner:
    """Costs of one PPO iteration."""

    def __init__(
        self, work: PPOWork, hardware: Hardware, speed: SpeedModel, buffers: Buffers, *, may_split: bool = False
    ) -> None:
        self.work, self.hardware, self.speed, self.buffers = work, hardware, speed, buffers
        self.may_split = may_split  # generation over several GPUs of a node; this package generates on each alone

    def best(self, gpus: int) -> PPOPlan | None:
        """The fastest setting that fits, without offload where that is possible."""
        for offload in (False, True):
            plans = [plan for layout in self.layouts(gpus, offload) if (plan := self.plan(layout)) is not None]
            if plans:
                return min(plans, key=lambda plan: plan.seconds)
        return None

    def layouts(self, gpus: int, offload: bool) -> list[Layout]:
        rows = ceil(self.work.samples / gpus)
        stages = (0,) if gpus == 1 and not offload else (1, 2, 3)
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= rows]
        return [
            Layout(
                gpus=gpus,
                seq_len=self.work.length,
                micro_batch=size,
                accumulation=ceil(rows / size),
                zero=zero,
                shard=1 if zero == 0 else gpus,
                recompute=recompute,
                offload=offload,
            )
            for zero in stages
            for size in sizes
            for recompute in ("none", "full")
        ]

    def plan(self, layout: Layout) -> PPOPlan | None:
        """Costs of one setting; None where it does not fit."""
        resting = self.resting(layout)
        trained = self.training_memory(layout, resting)
        if trained.total > self.hardware.memory_bytes:
            return None
        split = self.split(resting)
        rows = 0 if split is None else self.rows_at_once(resting, split)
        if split is None or rows < 1:
            return None
        rows = min(rows, ceil(self.work.samples * split / layout.gpus))
        generating = with_reserve({**resting, **self.generating(split, rows)})
        phases = {
            "generation": self.generation_seconds(layout, rows, split),
            "scoring": self.scoring_seconds(layout),
            "actor training": self.work.epochs * self.actor_step(layout).total,
        }
        if self.work.has_critic:
            phases["critic training"] = self.work.epochs * self.speed.step(self.work.critic, layout).total
        return PPOPlan(layout, phases, generating, trained, rows, split)

    def resting(self, layout: Layout) -> dict[str, float]:
        """What all four models hold between the phases; frozen ones are sharded under ZeRO-3."""
        frozen = BF16 / (layout.gpus if layout.zero == 3 else 1)
        held: dict[str, float] = {}
        trained = {"actor": self.work.actor} | ({"critic": self.work.critic} if self.work.has_critic else {})
        for name, network in trained.items():
            states = model_states(network, layout, self.buffers)
            kept = {key: size for key, size in states.items() if "gathered" not in key and "buffers" not in key}
            held[f"{name} with optimizer"] = sum(kept.values())
        held["reference (bf16)"] = frozen * self.work.actor.parameters
        held["reward model (bf16)"] = frozen * self.work.critic.parameters if self.work.has_reward else 0.0
        return held

    def training_memory(self, layout: Layout, resting: dict[str, float]) -> Memory:
        """The peak of training: one model at work beside all four at rest."""
        tokens = layout.tokens_per_pass
        actor = self.work.actor
        states = model_states(actor, layout, self.buffers)
        moving = sum(size for name, size in states.items() if "gathered" in name or "buffers" in name)
        return with_reserve(
            {
                **resting,
                "gathered weights and buffers": moving,
                "activations": activations(actor, layout),
                "one layer at work": layer_peak(actor, tokens, layout.recompute == "full"),
                "loss": loss_peak(actor, tokens),
            }
        )

    def generating(self, split: int, rows: int) -> dict[str, float]:
        """What generation adds: a copy of the actor, and keys and values of the rows that are under way."""
        weights = self.work.weight_bits / 8 * self.work.actor.parameters
        return {
            "generating copy": weights / split,
            "keys and values": rows * self.cache_bytes() / split,
        }

    def cache_bytes(self) -> float:
        """Keys and values of one finished row."""
        network = self.work.actor
        return 2 * BF16 * network.layers * network.kv_heads * network.head_dim * self.work.length

    def split(self, resting: dict[str, float]) -> int | None:
        """GPUs that share a generating copy: the fewest that leave room for it and some rows."""
        free = 0.92 * self.hardware.memory_bytes - with_reserve(resting).total
        for ranks in (1, 2, 4, 8) if self.may_split else (1,):
            if self.generating(ranks, 4 * ranks)["generating copy"] + 4 * self.cache_bytes() <= free:
                return ranks
        return None

    def rows_at_once(self, resting: dict[str, float], split: int) -> int:
        """Rows of a generating group for whose whole length there is room."""
        free = 0.92 * self.hardware.memory_bytes - with_reserve(resting).total
        return int((free - self.generating(split, 0)["generating copy"]) / (self.cache_bytes() / split))

    def generation_seconds(self, layout: Layout, rows: int, split: int) -> float:
        """Prefill, then a token at a time for `rows` rows, as often as the samples ask for; before it the weights."""
        work, actor, hardware = self.work, self.work.actor, self.hardware
        mine = work.samples * split / layout.gpus
        rounds = mine / rows if mine > rows else 1.0
        bandwidth = STREAM * hardware.memory_bandwidth
        weights = work.weight_bits / 8 * (actor.parameters - (0 if actor.tied else actor.embedding)) / split
        cache = rows * self.cache_bytes() / split * (work.prompt_tokens + work.answer_tokens / 2) / work.length
        arithmetic = 2 * rows * actor.parameters / split / self.speed.flops
        talk = 2 * actor.layers * EXCHANGE if split > 1 else 0.0
        token = max((weights + cache) / bandwidth, arithmetic) + actor.layers * DECODE_LAUNCH + talk
        prompts = Layout(1, work.prompt_tokens, micro_batch=1, zero=0)
        prefill = mine / split * actor.layers * self.speed.forward(actor, prompts).layers
        gather = self.speed.gather_seconds(actor, layout)[0] if layout.gpus > 1 else 0.0
        return hardware.time_factor * (gather + prefill + rounds * work.answer_tokens * token)

    def scoring_seconds(self, layout: Layout) -> float:
        """One forward pass each: actor and reference (log-probabilities), critic (values), reward model (scores)."""
        seconds = 0.0
        small = self.work.has_critic + self.work.has_reward
        for network, times, head in ((self.work.actor, 2, True), (self.work.critic, small, False)):
            one = self.speed.forward(network, layout)
            compute = network.layers * one.layers + (one.head / 3 if head else 0.0)
            gather = self.speed.gather_seconds(network, layout)[0] if layout.zero == 3 else 0.0
            seconds += times * layout.accumulation * (compute + max(0.0, gather - compute))
        return self.hardware.time_factor * seconds

    def actor_step(self, layout: Layout) -> StepTime:
        """The actor's step; the pre-training text makes its batch longer."""
        share = 1 + self.work.pretrain_tokens / self.work.tokens
        return self.speed.step(self.work.actor, replace(layout, accumulation=ceil(layout.accumulation * share)))
