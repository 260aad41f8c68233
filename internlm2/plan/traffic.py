"""Bytes that a step moves: in and out of one GPU over its link, and over one node's network."""

from dataclasses import dataclass

from internlm2.plan.hardware import Hardware
from internlm2.plan.layout import Layout
from internlm2.plan.network import Network
from internlm2.plan.speed import BF16


@dataclass(frozen=True)
class Traffic:
    """Bytes a step, sent by one GPU over its link inside the node, and by one node over its network, by purpose."""

    link: dict[str, float]
    network: dict[str, float]


def traffic(network: Network, layout: Layout, hardware: Hardware, reduce_bytes: int = BF16) -> Traffic:
    """What ring collectives move. A ring over whole nodes crosses each link of the ring once for every byte."""
    near = hardware.gpus_per_node
    link: dict[str, float] = {}
    wide: dict[str, float] = {}

    def add(purpose: str, size: float, ranks: int) -> None:
        """`size` bytes pass every rank of a ring of `ranks`."""
        if ranks <= 1 or size <= 0:
            return
        moved = size * (ranks - 1) / ranks
        link[purpose] = link.get(purpose, 0.0) + moved
        if ranks > near:
            wide[purpose] = wide.get(purpose, 0.0) + moved

    weights, ranks, passes = BF16 * network.parameters, layout.reducing, layout.accumulation
    gradients = reduce_bytes * network.parameters
    if layout.zero == 3:
        add("weights", 2 * passes * weights, layout.gather or ranks)
        add("gradients", passes * gradients, ranks)
    else:
        reductions = passes if layout.zero == 2 else 1
        add("gradients", 2 * reductions * gradients, ranks)  # an all-reduce: every byte passes twice
        add("weights", weights if layout.zero else 0.0, layout.shard)
    if layout.sequence > 1:
        tokens = passes * layout.tokens_per_pass / layout.sequence
        repeated = 3 if layout.recompute == "full" else 2
        exchanged = repeated * network.layers * BF16 * tokens * (network.qkv_width + network.query_width)
        link["sequence"] = exchanged * (layout.sequence - 1) / layout.sequence
        if layout.sequence > near:
            wide["sequence"] = near * exchanged * (layout.sequence - near) / layout.sequence
    return Traffic(link, wide)
