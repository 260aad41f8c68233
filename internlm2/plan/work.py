"""What a stage asks for in each step, read from its config."""

from dataclasses import dataclass
from math import ceil

from internlm2.config import Config
from internlm2.plan.layout import Layout
from internlm2.plan.memory import Buffers
from internlm2.plan.network import Network

TRAINED_BY_ADAPTERS = 0.01  # share of the weights in adapters of rank 64 on all products, roughly


@dataclass(frozen=True)
class Work:
    """One stage's optimizer step, whatever runs it: `rows` sequences of `seq_len` tokens; `steps` None: unknown."""

    network: Network
    seq_len: int
    rows: int
    steps: int | None
    trained: float
    loss: bool

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.seq_len

    @classmethod
    def of(cls, config: Config) -> "Work":
        train = config.train
        return cls(
            network=Network.of(config.model),
            seq_len=train.seq_len,
            rows=train.rows_per_step,
            steps=None if train.by_epochs else train.total_steps,
            trained=1.0 if config.adapter.kind == "none" else TRAINED_BY_ADAPTERS,
            loss=config.stage.kind != "reward",
        )


def engine_layout(config: Config, rows: int, seq_len: int, micro_batch: int) -> tuple[Layout | None, str]:
    """The layout that the engine's keys ask for on `cluster.gpus` GPUs, or None and why it cannot run there."""
    engine, gpus = config.engine, config.cluster.gpus
    zero = 0 if engine.name == "single" else int(engine.name[-1])
    if zero == 0 and gpus > 1:
        return None, f"engine=single is one process, not {gpus}"
    degree, shard = engine.sequence_parallel, engine.zero.shard_group
    if gpus % degree or (shard is not None and gpus % shard):
        return None, f"engine.sequence_parallel={degree} and engine.zero.shard_group={shard} must divide {gpus} GPUs"
    if rows < gpus // degree:
        return None, f"{rows} rows a step are fewer than {gpus // degree} groups of ranks"
    layout = make_layout(
        rows,
        seq_len,
        gpus,
        zero=zero,
        shard=shard,
        sequence=degree,
        micro_batch=micro_batch,
        recompute=engine.recompute,
        offload=engine.zero.offload != "none",
    )
    return layout, ""


def make_layout(
    rows: int,
    seq_len: int,
    gpus: int,
    *,
    zero: int,
    shard: int | None,
    sequence: int,
    micro_batch: int,
    recompute: str,
    offload: bool = False,
) -> Layout:
    """The layout of a step over `rows` rows: the passes follow from those that a group of ranks gets."""
    share = ceil(rows * sequence / gpus)
    group = gpus if shard is None else shard
    return Layout(
        gpus=gpus,
        seq_len=seq_len,
        micro_batch=min(micro_batch, share),
        accumulation=ceil(share / micro_batch),
        zero=zero,
        shard=group if zero in (1, 2) else gpus if zero == 3 else 1,
        gather=group if zero == 3 and group < gpus else 0,
        sequence=sequence,
        recompute=recompute,
        offload=offload,
    )


def buffers(config: Config) -> Buffers:
    """Message sizes from the engine's keys."""
    zero = config.engine.zero
    return Buffers(
        zero.reduce_bucket, zero.gather_bucket, zero.live_parameters, 4 if zero.reduce_dtype == "fp32" else 2
    )
