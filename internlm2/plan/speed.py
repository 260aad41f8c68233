"""Seconds of one training step: what each part of it costs, and what bounds it.

Physics first (FLOPs, bytes, messages), one efficiency for each kind of work, fitted on published runs.
T tokens of a pass and replica, C hidden size, H heads, D head dim, V vocabulary.
"""

import math
from dataclasses import dataclass

from internlm2.plan.coefficients import Coefficients
from internlm2.plan.hardware import Hardware
from internlm2.plan.layout import Layout, Practice
from internlm2.plan.network import Network

BF16 = 2
FP32 = 4
HOST_BANDWIDTH = 20e9  # bytes/s of host memory and PCIe that one of a node's eight GPUs gets: assumed, not fitted
OPTIMIZER_BYTES = (
    30  # AdamW reads gradient, master and moments and writes master, moments and bf16 weight: 4 * 4 + 4 * 3 + 2
)
OPTIMIZER_PASSES = 3  # multi-tensor kernels go over them several times (unscale, norm, clip, update)
BACKWARD_ATTENTION = 2.5  # FLOPs of attention's backward over its forward: five products instead of two


@dataclass(frozen=True)
class StepTime:
    """Seconds a step, by what they are spent on; the parts add up to `total`."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """The part that takes the most time."""
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass(frozen=True)
class Pass:
    """Seconds of one forward pass, by kind of work, in one rank; `head` holds the loss's forward and backward."""

    products: float
    attention: float
    elementwise: float
    exchange: float
    launch: float
    head: float

    @property
    def layers(self) -> float:
        return self.products + self.attention + self.elementwise + self.exchange + self.launch


class SpeedModel:
    """Step times on one kind of hardware."""

    def __init__(self, coefficients: Coefficients, hardware: Hardware, practice: Practice) -> None:
        self.c, self.hardware, self.practice = coefficients, hardware, practice
        self.flops = hardware.peak_flops * getattr(coefficients, f"products_{hardware.family}")
        self.attention_flops = (
            hardware.peak_flops * getattr(coefficients, f"attention_{hardware.family}") * practice.attention_speed
        )

    def step(self, network: Network, layout: Layout) -> StepTime:
        """One optimizer step: passes, the loss, what of the traffic shows, and the update."""
        c, layers = self.c, network.layers
        one = self.forward(network, layout)
        again = c.recompute * (1.0 if layout.recompute == "full" else SELECTIVE) if layout.recompute != "none" else 0.0
        forward = layers * one.layers
        backward = layers * (
            2 * (one.products + one.elementwise + one.launch) + BACKWARD_ATTENTION * one.attention + one.exchange
        )
        recompute = again * forward
        shown = self.exposed(network, layout, forward, backward + recompute)
        passes = layout.accumulation
        parts = {
            "matrix products": passes * (3 * layers * one.products),
            "attention": passes * (1 + BACKWARD_ATTENTION) * layers * one.attention,
            "elementwise": passes * 3 * layers * one.elementwise,
            "loss": passes * one.head,
            "recomputation": passes * recompute,
            "sequence exchange": passes * 2 * layers * one.exchange,
            "launches": passes * 3 * layers * one.launch,
            "exposed traffic": shown,
            "optimizer": self.update(network, layout) + c.step,
        }
        factor = self.hardware.time_factor
        return StepTime({name: factor * seconds for name, seconds in parts.items() if seconds > 0})

    def forward(self, network: Network, layout: Layout) -> Pass:
        """One layer's forward pass over a rank's share of the tokens; `head` is the whole loss, with its backward."""
        c, tp = self.c, layout.tensor_parallel
        tokens = layout.tokens_per_pass / layout.sequence
        width, inner = network.query_width // tp, network.intermediate // tp
        products = (
            self.product(tokens, network.hidden, network.qkv_width // tp)
            + self.product(tokens, width, network.hidden)
            + self.product(tokens, network.hidden, inner) * (2 if network.gated else 1)
            + self.product(tokens, inner, network.hidden)
        )
        speed = self.attention_flops * (c.small_heads if network.head_dim < 128 else 1.0)
        attention = 2.0 * tokens * layout.seq_len * network.query_width / tp / speed
        shared = 10 * network.hidden  # norms and residual sums, which tensor parallelism does not split
        elements = shared + (network.layer_elements - shared) / tp
        scale = BF16 * tokens / self.hardware.memory_bandwidth
        elementwise = c.elementwise * self.practice.elementwise * elements * scale
        logits = c.logits * self.practice.loss_passes * 2 * scale * network.vocabulary / tp
        return Pass(
            products=products,
            attention=attention,
            elementwise=elementwise,
            exchange=self.exchange(network, layout, tokens),
            launch=c.launch,
            head=3 * self.product(tokens, network.hidden, network.vocabulary // tp) + logits,
        )

    def product(self, m: float, k: float, n: float) -> float:
        """[m, k] @ [k, n] in bf16: arithmetic, and the part of its operand traffic that arithmetic does not hide."""
        traffic = BF16 * (m * k + k * n + m * n)
        return 2.0 * m * k * n / self.flops + self.c.operands * traffic / self.hardware.memory_bandwidth

    def exchange(self, network: Network, layout: Layout, tokens: float) -> float:
        """Traffic inside a layer's forward: Ulysses' two all-to-alls, or two all-reduces of tensor parallelism."""
        tp, sp = layout.tensor_parallel, layout.sequence
        seconds = 0.0
        if sp > 1:
            moved = BF16 * tokens * (network.qkv_width + network.query_width) * (sp - 1) / sp
            seconds += moved / self.bandwidth(sp, 1, share=True) + 2 * self.c.hop * sp
        if tp > 1:
            seconds += 2 * 2 * BF16 * tokens * network.hidden * (tp - 1) / tp / self.bandwidth(tp, 1)
        return seconds

    def exposed(self, network: Network, layout: Layout, forward: float, backward: float) -> float:
        """Seconds of gradient and weight traffic that computation does not hide, over the whole step.

        ZeRO-3 gathers the weights in every pass and scatters gradients in every backward. ZeRO-1 reduces once a step,
        under the last backward, ZeRO-2 in every backward, since it keeps no whole gradient; both gather the updated
        weights after it.
        """
        c = self.c
        if layout.zero == 3:
            gather, scatter = self.gather_seconds(network, layout)
            return layout.accumulation * (
                hidden(forward, gather, c.exposed_gather) + hidden(backward, gather + scatter, c.exposed_gather)
            )
        reductions = layout.accumulation if layout.zero == 2 else 1
        shown = hidden(backward, self.reduction_seconds(network, layout), c.exposed_reduce)
        return reductions * shown + self.redistribution_seconds(network, layout)

    def gather_seconds(self, network: Network, layout: Layout) -> tuple[float, float]:
        """ZeRO-3: one gathering of all weights, and one reduce-scatter of all gradients."""
        ranks, tp, size = layout.reducing, layout.tensor_parallel, network.parameters / layout.tensor_parallel
        near = layout.gather or ranks
        gather = BF16 * size * (near - 1) / near / self.bandwidth(near, tp) + network.layers * self.c.hop * near
        sent = self.practice.reduce_bytes * size * (ranks - 1) / ranks
        scatter = sent / self.bandwidth(ranks, tp) + network.layers * self.c.hop * ranks
        return gather, scatter

    def reduction_seconds(self, network: Network, layout: Layout) -> float:
        """ZeRO-1, 2: the sum of gradients over all ranks, an all-reduce (a tree: latency grows with the logarithm)."""
        ranks, tp = layout.reducing, layout.tensor_parallel
        if ranks == 1:
            return 0.0
        size = self.practice.reduce_bytes * network.parameters / tp
        latency = network.layers * 8 * self.c.hop * math.log2(ranks)
        return 2 * size * (ranks - 1) / ranks / self.bandwidth(ranks, tp) + latency

    def redistribution_seconds(self, network: Network, layout: Layout) -> float:
        """ZeRO-1, 2: updated weights back to every rank of a sharding group."""
        shard, tp = layout.shard, layout.tensor_parallel
        if shard == 1:
            return 0.0
        size = BF16 * network.parameters / tp
        seconds = size * (shard - 1) / shard / self.bandwidth(shard, tp)
        if self.practice.broadcast_update and shard * tp > self.hardware.gpus_per_node:
            seconds += shard * self.c.broadcast
        return seconds

    def bandwidth(self, ranks: int, tensor_parallel: int, *, share: bool = False) -> float:
        """Bytes/s at which a ring over `ranks` ranks moves one rank's copy.

        Inside a node: its link. Across nodes the rings of all a node's ranks cross its network together, which a
        ring of a whole node uses fully; `tensor_parallel` rings share it. An all-to-all (`share`) splits it by GPU.
        """
        hardware = self.hardware
        inside = hardware.link_bandwidth * self.c.intra
        if ranks * tensor_parallel <= hardware.gpus_per_node:
            return inside
        rings = hardware.gpus_per_node if share else tensor_parallel
        return min(inside, hardware.node_bandwidth / rings * self.c.inter)

    def update(self, network: Network, layout: Layout) -> float:
        """AdamW over this rank's share of the states: bound by memory, on the host where they are offloaded."""
        share = network.parameters / layout.tensor_parallel / (layout.reducing if layout.zero == 3 else layout.shard)
        if layout.offload:
            return (OPTIMIZER_BYTES + FP32 + BF16) * share / HOST_BANDWIDTH
        return OPTIMIZER_PASSES * OPTIMIZER_BYTES * share / self.hardware.memory_bandwidth


SELECTIVE = 0.35  # selective recomputation runs a third of the forward again (every other layer's cheap parts)


def hidden(compute: float, traffic: float, exposed: float) -> float:
    """What of `traffic` shows beside `compute`: all that exceeds it, and the share `exposed` of the rest."""
    return max(0.0, traffic - compute) + exposed * min(compute, traffic)
