"""How a training step is laid over GPUs, and what a framework does around it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One way to run a step. `micro_batch` rows of `seq_len` tokens a forward pass, `accumulation` passes a step.

    zero             ZeRO stage: 0 (one copy of everything), 1, 2 or 3
    shard            ranks over which optimizer states (ZeRO-1, 2) are split; `gpus / tensor_parallel` for all
    gather           ranks that hold one whole copy of the weights together in ZeRO-3 (hpZ); 0: as `shard`
    sequence         degree of Ulysses sequence parallelism: the ranks that share a row
    tensor_parallel  only for published runs: this package has none
    """

    gpus: int
    seq_len: int
    micro_batch: int = 1
    accumulation: int = 1
    zero: int = 1
    shard: int = 1
    gather: int = 0
    sequence: int = 1
    tensor_parallel: int = 1
    recompute: str = "none"
    offload: bool = False

    @property
    def replicas(self) -> int:
        """Groups of ranks that work on rows of their own."""
        return self.gpus // (self.sequence * self.tensor_parallel)

    @property
    def reducing(self) -> int:
        """Ranks over which gradients are summed."""
        return self.gpus // self.tensor_parallel

    @property
    def tokens_per_pass(self) -> int:
        """Tokens of one forward pass of one replica."""
        return self.micro_batch * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        return self.tokens_per_pass * self.accumulation * self.replicas


@dataclass(frozen=True)
class Practice:
    """What differs between frameworks at the same layout.

    attention_speed    speed of the attention kernel over that of the first FlashAttention, which the A100 and most
                       H100 rows of the published table used; FlashAttention-2 reports about twice (arXiv:2307.08691)
    broadcast_update   after a step each rank broadcasts its share of the weights in turn (InternEvo), instead of
                       one all-gather
    loss_passes        passes over the logits relative to an unfused fp32 cross entropy
    elementwise        elementwise passes relative to eager kernels; torch.compile fuses many of them
    reduce_bytes       bytes of an element of a gradient on the wire
    """

    attention_speed: float = 1.0
    broadcast_update: bool = False
    loss_passes: float = 1.0
    elementwise: float = 1.0
    reduce_bytes: int = 2


OURS = Practice(attention_speed=1.7)
