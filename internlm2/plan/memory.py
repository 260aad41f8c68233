"""Bytes on one GPU, by what they hold, and their peak over a step.

Counted from what the code keeps: the engine's copies of the weights, what each layer saves for its backward pass, the
loss, buffers of collectives. C hidden size, V vocabulary, T tokens of a rank's pass, P parameters.
"""

from dataclasses import dataclass

from internlm2.plan.layout import Layout
from internlm2.plan.network import Network
from internlm2.plan.speed import BF16, FP32

LOSS_CHUNK = 1 << 22  # logits that exist at a time: internlm2/model/loss.py
RESERVE = 1.5 * 2**30  # CUDA context, NCCL's buffers and cuBLAS' workspace: assumed, not measured
FRAGMENTATION = 0.03  # share of what is allocated that the caching allocator cannot give out: assumed


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by component; `total` includes the reserve for context and fragmentation."""

    parts: dict[str, float]

    @property
    def allocated(self) -> float:
        """What tensors take."""
        return sum(size for name, size in self.parts.items() if name != "context, fragmentation")

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Buffers:
    """Sizes of ZeRO's messages in elements, and bytes of an element of a gradient on the wire."""

    reduce_bucket: int = 500_000_000
    gather_bucket: int = 500_000_000
    live_parameters: int = 1_000_000_000
    reduce_bytes: int = FP32


def training(network: Network, layout: Layout, buffers: Buffers, *, trained: float = 1.0, loss: bool = True) -> Memory:
    """Peak of one training step of an engine in bf16 with fp32 masters, moments and gradient sums.

    `trained` is the share of the weights that has gradients and moments (adapters train few); `loss`: with the
    language model's head (a reward model or critic has none).
    """
    states = model_states(network, layout, buffers, trained)
    moving = states.pop("communication buffers", 0.0)
    held = moving / 2 if layout.zero == 3 else 0.0  # DeepSpeed's ZeRO 3 makes its bucket once; others come and go
    tokens = layout.tokens_per_pass / layout.sequence
    layer, head = layer_peak(network, tokens, layout.recompute == "full"), loss_peak(network, tokens) if loss else 0.0
    kept = activations(network, layout)
    # The loss is gone before a layer's gradients are made, and these reduced. ZeRO 1 reduces its fp32 sums in place.
    at_loss, in_backward = kept + head, kept + layer + (moving - held if layout.zero >= 2 else 0.0)
    if at_loss >= in_backward:
        parts = {**states, "communication buffers": held, "activations": kept, "loss": head}
    else:
        held = moving if layout.zero >= 2 else held
        parts = {**states, "communication buffers": held, "activations": kept, "one layer at work": layer}
    if layout.zero == 0 and layout.accumulation == 1:
        # Gradients are made while activations are let go, and the loss before both: only what exceeds them counts.
        parts["gradients (fp32)"] = max(0.0, parts["gradients (fp32)"] - kept - max(layer, head))
    return with_reserve(parts)


def with_reserve(parts: dict[str, float]) -> Memory:
    """The same, with what lies beside the tensors; components of no size are left out."""
    parts = {name: size for name, size in parts.items() if size > 0}
    return Memory({**parts, "context, fragmentation": RESERVE + FRAGMENTATION * sum(parts.values())})


def model_states(network: Network, layout: Layout, buffers: Buffers, trained: float = 1.0) -> dict[str, float]:
    """Weights, gradients, masters and moments of a rank, and the buffers that move them."""
    size, ranks = float(network.parameters), layout.reducing
    shard = {0: 1, 1: layout.shard, 2: layout.shard, 3: ranks}[layout.zero]
    states = trained * size / shard
    kept = 0.0 if layout.offload and layout.zero >= 2 else trained * size / (shard if layout.zero >= 2 else 1)
    parts = {
        "weights (bf16)": BF16 * size / (ranks if layout.zero == 3 else 1),
        "gradients (fp32)": FP32 * kept,  # offloaded as they are reduced, with the states that they update
        "masters (fp32)": 0.0 if layout.offload else FP32 * states,
        "moments (fp32)": 0.0 if layout.offload else 2 * FP32 * states,
    }
    if layout.zero == 3:
        if layout.gather and layout.gather < ranks:
            parts["weights of the node (bf16)"] = BF16 * size / layout.gather
        largest = max(network.embedding, network.layer_weights)
        live = min(size, max(buffers.live_parameters, 2 * largest))
        parts["gathered weights"] = BF16 * live
    if layout.zero and ranks > 1:
        bucket = min(buffers.reduce_bucket, trained * size)
        parts["communication buffers"] = 2 * buffers.reduce_bytes * bucket
    return parts


def activations(network: Network, layout: Layout) -> float:
    """What the layers of one forward pass keep for the backward pass."""
    tokens = layout.tokens_per_pass / layout.sequence
    inputs = BF16 * tokens * network.hidden  # of each layer, kept in either case
    if layout.recompute == "full":
        return network.layers * inputs
    return network.layers * saved_by_layer(network, tokens)


def saved_by_layer(network: Network, tokens: float) -> float:
    """Input, both norms' outputs, the sum after attention, queries to values, attention's output and its log-sum-exp,
    gate, up and their product.
    """
    width = 4 * network.hidden + network.qkv_width + network.query_width + 3 * network.intermediate
    return tokens * (BF16 * width + FP32 * (network.heads + 2))


def layer_peak(network: Network, tokens: float, recomputed: bool) -> float:
    """A layer's backward pass: gradients of the feed-forward's two branches and product beside one temporary, and with
    recomputation all that the layer would have kept.
    """
    gradients = BF16 * tokens * (4 * network.intermediate + 2 * network.hidden)
    return gradients + (saved_by_layer(network, tokens) if recomputed else 0.0)


def loss_peak(network: Network, tokens: float) -> float:
    """The head's gradients, made in the forward pass, and one chunk of logits with its probabilities."""
    chunk = LOSS_CHUNK * (BF16 + 2 * FP32 + BF16)
    return BF16 * tokens * network.hidden + (FP32 + BF16) * network.embedding + chunk
