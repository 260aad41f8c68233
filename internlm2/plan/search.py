"""The fastest setting that fits: engines, sharding groups, sequence parallelism, recomputation and micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass

from internlm2.plan.hardware import Hardware
from internlm2.plan.layout import Layout
from internlm2.plan.memory import Buffers, Memory, training
from internlm2.plan.speed import SpeedModel, StepTime
from internlm2.plan.traffic import Traffic, traffic
from internlm2.plan.work import Work, make_layout

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Candidate:
    """One setting with what it costs."""

    layout: Layout
    memory: Memory
    time: StepTime
    traffic: Traffic

    def fits(self, hardware: Hardware) -> bool:
        return self.memory.total <= hardware.memory_bytes

    def overrides(self, gpus_per_node: int) -> list[str]:
        """The keys that ask for this setting on the command line."""
        layout = self.layout
        keys = [f"engine={'single' if layout.zero == 0 else f'zero{layout.zero}'}"]
        if layout.zero:
            group = layout.gather if layout.zero == 3 else layout.shard
            if 0 < group < layout.gpus:
                keys.append(f"engine.zero.shard_group={group}")
            keys.append(f"engine.sequence_parallel={layout.sequence}")
        if layout.offload:
            keys.append("engine.zero.offload=optimizer")
        return [*keys, f"engine.recompute={layout.recompute}", f"train.micro_batch={layout.micro_batch}"]


class Planner:
    """Costs of settings for one stage on one kind of machine."""

    def __init__(self, work: Work, hardware: Hardware, speed: SpeedModel, buffers: Buffers) -> None:
        self.work, self.hardware, self.speed, self.buffers = work, hardware, speed, buffers

    def cost(self, layout: Layout) -> Candidate:
        """Memory, time and traffic of one setting, whether or not it fits."""
        work = self.work
        return Candidate(
            layout,
            training(work.network, layout, self.buffers, trained=work.trained, loss=work.loss),
            self.speed.step(work.network, layout),
            traffic(work.network, layout, self.hardware, self.buffers.reduce_bytes),
        )

    def best(self, gpus: int) -> Candidate | None:
        """The fastest setting that fits `gpus` GPUs; None where none does, not even with offload."""
        for offload in (False, True):
            fitting = [
                candidate
                for layout in self.layouts(gpus, offload)
                if (candidate := self.cost(layout)).fits(self.hardware)
            ]
            if fitting:
                return min(fitting, key=lambda one: (one.time.total, one.memory.total))
        return None

    def layouts(self, gpus: int, offload: bool) -> Iterator[Layout]:
        """Every setting that this package can run."""
        near = self.hardware.gpus_per_node
        rows = self.work.rows
        degrees = [n for n in range(1, min(gpus, near) + 1) if gpus % n == 0 and self.work.network.kv_heads % n == 0]
        stages = (0,) if gpus == 1 and not offload else (1, 2, 3)
        for sequence in degrees:
            if rows * sequence < gpus:
                continue
            share = -(-rows * sequence // gpus)
            for zero in stages:
                groups: set[int | None] = {None}
                if zero and gpus > near and gpus % near == 0:
                    groups.add(near)
                for shard in groups:
                    for micro_batch in (size for size in MICRO_BATCHES if size <= share and share % size == 0):
                        for recompute in ("none", "full"):
                            yield make_layout(
                                rows,
                                self.work.seq_len,
                                gpus,
                                zero=zero,
                                shard=shard,
                                sequence=sequence,
                                micro_batch=micro_batch,
                                recompute=recompute,
                                offload=offload,
                            )
